#include "core/base/error.h"
#include "core/model/json_document.h"
#include "core/model/token_model.h"

namespace kvlapse {
namespace {

class WordListModel final : public TokenModel {
 public:
  explicit WordListModel(WordList parts) : parts_(std::move(parts)) {}

  void encode(std::string_view piece, std::vector<int32_t>& ids) const override {
    auto found = parts_.vocabulary.find(std::string(piece));
    if (found == parts_.vocabulary.end() && parts_.unknown < 0)
      fail("{}: vocabulary: expected a token for '{}', found none", parts_.source, quotable(piece));
    ids.push_back(found == parts_.vocabulary.end() ? parts_.unknown : found->second);
  }

 private:
  WordList parts_;
};

}  // namespace

std::unique_ptr<TokenModel> make_word_list(WordList parts) {
  return std::make_unique<WordListModel>(std::move(parts));
}

}  // namespace kvlapse
