#include <algorithm>

#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"

namespace kvlapse {
namespace {

constexpr int kPromptWindow = 32;  // SnapKV cut of a long prompt: last queries that vote
constexpr int kPromptPool = 5;     // width of its average pool, zero padded

class LongFlow final : public Policy {
 public:
  using Policy::Policy;

  // Mean over query heads and D of |p v| = p * |v|_1 / (Hq D). A positive constant cannot change an argmin,
  // but the recorded score is the published one.
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const CacheGeometry& g = at.geometry;
    const bool shared = out.n_rows() == 1;
    for (int q = 0; q < g.n_q_heads; ++q) {
      int h = g.kv_head_of(q);
      multiply_add(inputs.attention(q), inputs.value_l1(h), out.row(shared ? 0 : h));
    }
    const float scale = 1.0f / static_cast<float>((shared ? g.n_q_heads : g.group()) * g.head_dim);
    for (int r = 0; r < out.n_rows(); ++r)
      for (float& score : out.row(r)) score *= scale;
  }

  // The repository's snapkv(): softmax of the last 32 queries over the keys before them, summed over heads
  // and queries, average pooled.
  void score_prompt(const LayerContext& at, LayerInputs& inputs, const SlotState&,
                    Scores& out) const override {
    const CacheGeometry& g = at.geometry;
    const bool shared = out.n_rows() == 1;
    const int window = static_cast<int>(prompt_rule(at.budget).recent);
    for (int r = 0; r < out.n_rows(); ++r) {
      const int n = at.count(r), prefix = n - window;
      std::vector<float> sum(prefix, 0.0f), weights(prefix);
      for (int q = 0; q < g.n_q_heads; ++q) {
        if (!shared && g.kv_head_of(q) != r) continue;
        std::span<const float> logits = inputs.window_logits(q, window);
        const int rows = static_cast<int>(logits.size()) / n;
        for (int w = 0; w < rows; ++w) {
          softmax(logits.subspan(static_cast<size_t>(w) * n, prefix), weights);
          for (int i = 0; i < prefix; ++i) sum[i] += weights[i];
        }
      }
      std::span<float> row = out.row(r);
      for (int i = 0; i < prefix; ++i) {
        float total = 0;
        for (int j = std::max(0, i - kPromptPool / 2); j <= std::min(prefix - 1, i + kPromptPool / 2); ++j)
          total += sum[j];
        row[i] = total / kPromptPool;
      }
    }
  }

  EvictionRule prompt_rule(int budget) const override {
    EvictionRule rule = Policy::prompt_rule(budget);
    rule.recent = std::max<double>(rule.recent_slots(budget), std::min(kPromptWindow, budget / 2));
    return rule;
  }
};

}  // namespace

PolicyInfo longflow_info() {
  PolicyInfo info;
  info.name = "longflow";
  info.reference = "yisunlp";
  info.summary =
      "least contribution |p v| of the current step, victims shared by the layer, overwritten in place";
  info.formula = "score(i) = mean over query heads and D of |p_i v_i|; victim = first minimum";
  info.paper = "arXiv 2603.11504, equations 2 to 6, algorithm 1";
  info.source = "yisunlp/LongFlow 89a68d3, models/ours.py";
  info.deviations = {
      "scores stay fp32 (the released kernels rank in fp16 and turn small ones into ties: cast=fp16)",
      "a free slot is found by the slot table instead of by a zero loss",
      "the prompt's vote window is at most half the budget (the repository needs budgets above 33)"};
  info.rule.granularity = Granularity::layer;
  info.signals = Signal::attention | Signal::value_l1 | Signal::query_window;
  info.query_window = kPromptWindow;
  info.fused = FusedScore::contribution;
  info.device = DeviceScore::contribution;
  return info;
}

std::unique_ptr<Policy> make_longflow(PolicyInfo info) {
  return std::make_unique<LongFlow>(std::move(info));
}

}  // namespace kvlapse
