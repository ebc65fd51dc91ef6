#include <algorithm>
#include <vector>

#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

constexpr float kNever = 1e9f;  // steps: later than any sequence

enum class Question : uint8_t { mass, peak, next_use, error };

// Asks the finished trace what the coming steps do with each held token. Greedy: no oracle here is the
// optimum.
class Oracle final : public Policy {
 public:
  Oracle(PolicyInfo info, Question question) : Policy(std::move(info)), question_(question) {}

  void score(const LayerContext& at, LayerInputs&, const SlotState&, Scores& out) const override {
    std::vector<float> answer;
    for (int r = 0; r < out.n_rows(); ++r)
      reduce_heads(kv_heads_of(at, out, r), at.rule.gqa, out.row(r), [&](int h) {
        answer.resize(out.row(r).size());
        ask(at, h, answer);
        return std::span<const float>(answer);
      });
  }

 private:
  void ask(const LayerContext& at, int h, std::span<float> answer) const {
    const int horizon = static_cast<int>(parameter("horizon"));
    std::span<const Pos> positions = at.positions(h);
    switch (question_) {
      case Question::mass: at.future->mass(h, at.step, horizon, positions, answer); return;
      case Question::peak:
        at.future->peak(h, at.step, horizon, static_cast<int>(parameter("block")), positions, answer);
        return;
      case Question::error: at.future->error(h, at.step, horizon, positions, answer); return;
      case Question::next_use:
        at.future->next_use(h, at.step, horizon, static_cast<float>(parameter("threshold")), positions,
                            answer);
        for (float& steps : answer) steps = -std::min(steps, kNever);
        return;
    }
  }
  Question question_;
};

// The most attended tokens of each step: no eviction policy can do better, none can reach it.
class TopB final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    for (int r = 0; r < out.n_rows(); ++r)
      reduce_heads(q_heads_of(at, out, r), at.rule.gqa, out.row(r),
                   [&](int q) { return inputs.attention(q); });
  }
};

PolicyInfo oracle(std::string_view name, std::string_view summary, std::string_view formula) {
  PolicyInfo info;
  info.name = name;
  info.summary = summary;
  info.formula = formula;
  info.paper = "a bound for comparison: needs the finished trace";
  info.deviations = {
      "greedy at each decision, on the full cache's attention: not the optimum, and replay only"};
  info.parameters = {{"horizon", 512, 0, 1e6, "coming steps that count; 0: to the end"}};
  info.signals = static_cast<SignalSet>(Signal::future);
  return info;
}

}  // namespace

PolicyInfo oracle_topb_info() {
  PolicyInfo info;
  info.name = "oracle_topb";
  info.summary = "bound: attends to the B most attended tokens of each step; unreachable, memory not reduced";
  info.formula = "the B highest of the full cache's attention, mean over the group, anew at each step";
  info.paper = "a bound for comparison: needs the full cache";
  info.deviations = {"a selection bound: an evicted token could come back, which no eviction policy can do",
                     "one set per kv head: its query heads share it"};
  info.signals = static_cast<SignalSet>(Signal::attention);
  info.evicts = false;
  info.selects = true;
  return info;
}

std::unique_ptr<Policy> make_oracle_topb(PolicyInfo info) {
  return std::make_unique<TopB>(std::move(info));
}

PolicyInfo oracle_mass_info() {
  return oracle("oracle_mass", "oracle: most attention in the coming steps",
                "score(i) = sum over the next `horizon` steps of attention(i), mean over the group");
}

PolicyInfo oracle_max_info() {
  PolicyInfo info = oracle("oracle_max", "oracle: largest attention in a coming block of steps",
                           "score(i) = max over coming blocks of the mean attention(i) within the block");
  info.paper = "the golden eviction of arXiv 2602.03203";
  info.parameters.push_back({"block", 32, 1, 65536, "steps that are averaged before the maximum"});
  return info;
}

PolicyInfo oracle_next_use_info() {
  PolicyInfo info = oracle("oracle_next_use", "oracle: soonest used again (Belady)",
                           "score(i) = -(steps until attention(i) > threshold)");
  info.parameters.push_back({"threshold", 0.01, 0, 1, "attention weight that counts as use"});
  return info;
}

PolicyInfo oracle_error_info() {
  return oracle(
      "oracle_error", "oracle: largest output error in the coming steps if it alone were missing",
      "score(i) = sum over the next `horizon` steps of w_i / (1 - w_i) |o - v_i|_2, mean over the group");
}

std::unique_ptr<Policy> make_oracle_mass(PolicyInfo info) {
  return std::make_unique<Oracle>(std::move(info), Question::mass);
}
std::unique_ptr<Policy> make_oracle_max(PolicyInfo info) {
  return std::make_unique<Oracle>(std::move(info), Question::peak);
}
std::unique_ptr<Policy> make_oracle_next_use(PolicyInfo info) {
  return std::make_unique<Oracle>(std::move(info), Question::next_use);
}
std::unique_ptr<Policy> make_oracle_error(PolicyInfo info) {
  return std::make_unique<Oracle>(std::move(info), Question::error);
}

}  // namespace kvlapse
