#include "trace/views/token_texts.h"

namespace kvlapse {

std::vector<std::string> read_token_texts(const TraceReader& reader, int sequence) {
  const std::map<int32_t, std::string> texts = reader.token_texts();
  std::vector<std::string> out;
  for (int32_t token : reader.sequence(sequence).tokens) {
    const auto found = texts.find(token);
    out.push_back(found == texts.end() ? std::string() : found->second);
  }
  return out;
}

}  // namespace kvlapse
