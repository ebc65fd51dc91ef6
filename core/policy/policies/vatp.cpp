#include <cmath>

#include "core/policy/policies/policies.h"
#include "core/policy/scoring/attention_sum.h"

namespace kvlapse {
namespace {

class Vatp final : public AttentionSum {
 public:
  using AttentionSum::AttentionSum;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState& state,
             Scores& out) const override {
    for (int r = 0; r < out.n_rows(); ++r) {
      const HeadRange heads = kv_heads_of(at, out, r);
      std::span<float> row = out.row(r);
      for (int h = heads.begin; h < heads.end; ++h)
        multiply_add(state.column(0, h).first(row.size()), inputs.value_l1(h), row);
    }
  }
};

// Column 0 holds |v|_2 when it counts.
class VatpLongFlow final : public Policy {
 public:
  using Policy::Policy;
  void observe(const LayerContext& at, LayerInputs& inputs, SlotState& state) const override {
    if (info().state_columns == 0) return;
    for (int h = 0; h < at.geometry.n_kv_heads; ++h) {
      const Slot newest = at.table->newest(h);
      std::span<const float> v = inputs.value_row(h, newest, at.geometry.head_dim);
      state.column(0, h)[raw(newest)] = std::sqrt(dot(v.data(), v.data(), v.size()));
    }
  }
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState& state,
             Scores& out) const override {
    for (int r = 0; r < out.n_rows(); ++r) {
      std::span<float> row = out.row(r);
      reduce_heads(q_heads_of(at, out, r), GqaRule::mean, row, [&](int q) { return inputs.attention(q); });
      if (info().state_columns == 0) continue;
      const HeadRange heads = kv_heads_of(at, out, r);
      for (size_t i = 0; i < row.size(); ++i) {
        float norm = 0;
        for (int h = heads.begin; h < heads.end; ++h) norm += state.column(0, h)[i];
        row[i] *= norm / static_cast<float>(heads.size());
      }
    }
  }
};

}  // namespace

PolicyInfo vatp_guozhiyu_info() {
  PolicyInfo info;
  info.name = "vatp";
  info.reference = "guozhiyu";
  info.summary = "accumulated attention times the value's L1 norm, on top of H2O";
  info.formula =
      "score(i) = (sum over steps of attention(i), mean over the group) |v_i|_1; the first tokens are kept";
  info.paper = "arXiv 2406.12335";
  info.source = "guozhiyu/vatp";
  info.deviations = {"the original has one kv head per query head; a group of query heads is averaged (gqa)",
                     "the first 20 tokens are protected instead of getting the highest score"};
  info.parameters = {{"sinks", 20, 0, 4096, "first positions that are never evicted"}};
  info.rule.recent = 0.5;
  info.rule.sinks = 20;
  info.signals = Signal::attention | Signal::value_l1;
  info.device = DeviceScore::accumulated_contribution;
  info.state_columns = 1;
  return info;
}

std::unique_ptr<Policy> make_vatp_guozhiyu(PolicyInfo info) {
  info.rule.sinks = static_cast<int>(info.parameters[0].value);
  return std::make_unique<Vatp>(std::move(info));
}

PolicyInfo vatp_longflow_info() {
  PolicyInfo info;
  info.name = "vatp";
  info.reference = "longflow";
  info.summary = "the LongFlow repository's VATP baseline: the current step's attention, shared by the layer";
  info.formula =
      "score(i) = mean over query heads of attention(i); value_norm=1: times the mean over kv heads of "
      "|v_i|_2";
  info.paper = "arXiv 2603.11504 (as a baseline); compare arXiv 2406.12335";
  info.source = "yisunlp/LongFlow 89a68d3, models/vatp.py";
  info.deviations = {
      "against vatp@guozhiyu: the current step only, L2 instead of L1, shared by all heads, no sinks",
      "as run, the repository's VATP keeps exactly what its H2O keeps, at every step: the value norm does "
      "not reach its ranking; value_norm=1 is what it means to do",
      "attention sees one token more than the budget, as in the code"};
  info.parameters = {{"value_norm", 0, 0, 1, "1: multiply by the value's norm"}};
  info.rule.granularity = Granularity::layer;
  info.rule.headroom = 0;
  info.rule.recent = 0.5;
  info.signals = static_cast<SignalSet>(Signal::attention);
  info.device = DeviceScore::attention_mean;
  return info;
}

std::unique_ptr<Policy> make_vatp_longflow(PolicyInfo info) {
  if (info.parameters[0].value != 0) {
    info.signals = Signal::attention | Signal::values;
    info.device = DeviceScore::none;
    info.state_columns = 1;
  }
  return std::make_unique<VatpLongFlow>(std::move(info));
}

}  // namespace kvlapse
