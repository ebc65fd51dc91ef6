// Forwards LayerInputs and throws when a policy reads a signal that it does not declare: declarations drive
// what the engine computes, stores and charges for, so they must be true.
#pragma once

#include "core/base/error.h"
#include "core/policy/policy.h"

namespace kvlapse {

class CheckedInputs final : public LayerInputs {
 public:
  CheckedInputs(LayerInputs& inputs, const PolicyInfo& info) : inputs_(inputs), info_(info) {}

  std::span<const float> logits(int h) override { return need(Signal::logits, "logits"), inputs_.logits(h); }
  std::span<const float> attention(int h) override {
    return need(Signal::attention, "attention"), inputs_.attention(h);
  }
  std::span<const float> output(int h) override { return need(Signal::output, "output"), inputs_.output(h); }
  std::span<const float> value_l1(int h) override {
    return need(Signal::value_l1, "value_l1"), inputs_.value_l1(h);
  }
  std::span<const float> keys(int h) override { return need(Signal::keys, "keys"), inputs_.keys(h); }
  std::span<const float> values(int h) override { return need(Signal::values, "values"), inputs_.values(h); }
  std::span<const float> value_row(int h, Slot slot, int head_dim) override {
    return need(Signal::values, "values"), inputs_.value_row(h, slot, head_dim);
  }
  bool last_alike(int h, float threshold, std::span<int32_t> out) override {
    return need(Signal::keys, "keys"), inputs_.last_alike(h, threshold, out);
  }
  bool redundancy(int h, float threshold, std::span<float> out) override {
    return need(Signal::keys, "keys"), inputs_.redundancy(h, threshold, out);
  }
  std::span<const float> window_queries(int w) override { return need_window(w), inputs_.window_queries(w); }
  std::span<const float> window_logits(int h, int w) override {
    return need_window(w), inputs_.window_logits(h, w);
  }

 private:
  void need(Signal signal, std::string_view name) const {
    if (!contains(info_.signals, signal))
      fail("policy {} reads the signal '{}', which it does not declare", info_.name, name);
  }
  void need_window(int w) const {
    need(Signal::query_window, "query_window");
    if (w > info_.query_window)
      fail("policy {} asks for {} queries, it declares {}", info_.name, w, info_.query_window);
  }
  LayerInputs& inputs_;
  const PolicyInfo& info_;
};

}  // namespace kvlapse
