#include "core/policy/policies/policies.h"

namespace kvlapse {
namespace {

class StreamingLlm final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs&, const SlotState&, Scores& out) const override {
    for (int r = 0; r < out.n_rows(); ++r) {
      std::span<const Pos> positions = at.positions(r);
      std::span<float> row = out.row(r);
      for (size_t s = 0; s < row.size(); ++s) row[s] = static_cast<float>(raw(positions[s]));
    }
  }
};

}  // namespace

PolicyInfo streaming_llm_info() {
  PolicyInfo info;
  info.name = "streaming_llm";
  info.summary = "the first tokens (attention sinks) and the newest ones";
  info.formula = "score = position; the first `sinks` positions are protected";
  info.paper = "arXiv 2309.17453";
  info.source = "Zefan-Cai/R-KV d15c976 (absolute positions: keys keep their original rotation)";
  info.deviations = {
      "the paper numbers positions inside the cache; like most reasoning papers this keeps absolute ones"};
  info.parameters = {{"sinks", 4, 0, 4096, "first positions that are never evicted"}};
  info.rule.granularity = Granularity::layer;
  info.rule.sinks = 4;
  return info;
}

std::unique_ptr<Policy> make_streaming_llm(PolicyInfo info) {
  info.rule.sinks = static_cast<int>(info.parameters[0].value);
  return std::make_unique<StreamingLlm>(std::move(info));
}

}  // namespace kvlapse
