#include <algorithm>
#include <vector>

#include "core/base/error.h"
#include "core/policy/policies/policies.h"
#include "core/policy/registry.h"

namespace kvlapse {
namespace {

// Bases whose scores can be compared across heads; the first is the default.
constexpr std::string_view kBases[] = {"snapkv", "snapkv@kvpress",     "rkv",     "h2o",
                                       "tova",   "observed_attention", "knorm",   "keydiff",
                                       "lagkv",  "expected_attention", "longflow"};

// Another policy's scores, ranked over all heads of the layer at once: the evictor's ragged rule does the
// rest.
class AdaKv final : public Policy {
 public:
  AdaKv(PolicyInfo info, std::unique_ptr<Policy> base) : Policy(std::move(info)), base_(std::move(base)) {}
  void observe(const LayerContext& at, LayerInputs& inputs, SlotState& state) const override {
    base_->observe(at, inputs, state);
  }
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState& state,
             Scores& out) const override {
    base_->score(at, inputs, state, out);
  }

 private:
  std::unique_ptr<Policy> base_;
};

const PolicyEntry& base_entry(std::string_view text) {
  const PolicySpec spec = parse_policy_spec(text);
  for (const PolicyEntry& entry : policy_registry()) {
    const PolicyInfo info = entry.info();
    if (info.name == spec.name && (spec.reference.empty() || spec.reference == info.reference)) return entry;
  }
  fail("policy adakv: base {} is not in the catalogue", text);
}

PolicyInfo info_over(std::string_view base_text) {
  const PolicyInfo base = base_entry(base_text).info();
  PolicyInfo info;
  info.name = "adakv";
  info.version = base.version;
  info.summary = "one ranking over all heads of a layer: heads keep different counts; compacted periodically";
  info.formula =
      "scores of `base` compared raw across kv heads; the layer keeps its H B highest, each head at least "
      "floor B of "
      "its own";
  info.paper = "arXiv 2407.11550";
  info.source = "NVIDIA/kvpress 0.5.5, presses/adakv_press.py (masking), here with real ragged compaction";
  info.deviations = {"evicted tokens are gone (the class masks them and never shrinks the cache)"};
  info.parameters = {{"base", 0, 0, 0, "whose scores", {std::begin(kBases), std::end(kBases)}},
                     {"floor", 0.2, 0, 1, "share of the budget that every head keeps"}};
  for (const ParameterInfo& p : base.parameters) info.parameters.push_back(p);
  info.rule = base.rule;
  info.rule.granularity = Granularity::kv_head;
  info.rule.ragged = true;
  if (info.rule.cadence == 1) info.rule.cadence = 128;
  info.rule.headroom = 0;
  if (info.rule.reclaim == Reclaim::fill) info.rule.reclaim = Reclaim::compact;
  return info;
}

}  // namespace

PolicyInfo adakv_info() {
  return info_over(kBases[0]);
}

PolicyInfo adakv_info_for(const PolicySpec& spec) {
  for (const auto& [key, value] : spec.options)
    if (key == "base" && std::find(std::begin(kBases), std::end(kBases), value) != std::end(kBases))
      return info_over(value);
  return adakv_info();  // an unknown base is refused where options are read
}

std::unique_ptr<Policy> make_adakv(PolicyInfo info) {
  const PolicyEntry& entry =
      base_entry(info.parameters[0].choices[static_cast<size_t>(info.parameters[0].value)]);
  PolicyInfo base = entry.info();
  for (size_t i = 0; i < base.parameters.size(); ++i) base.parameters[i].value = info.parameters[i + 2].value;
  base.rule = info.rule;
  std::unique_ptr<Policy> policy = entry.make(std::move(base));
  info.rule = policy->info().rule;
  info.rule.ragged_floor = info.parameters[1].value;
  info.signals = policy->info().signals;
  info.query_window = policy->info().query_window;
  info.state_columns = policy->info().state_columns;
  info.score_parts = policy->info().score_parts;
  return std::make_unique<AdaKv>(std::move(info), std::move(policy));
}

}  // namespace kvlapse
