// AheadBackend: the Backend of a decoder that runs ahead. Prompts pass through another backend, which gives
// the first tokens and makes a long prompt's cut; its K/V move to the device at the first decode step, and
// the other backend goes. From there the session's calls ask for what the device has computed by itself:
// head() keeps the device's queue full and takes the oldest step, whose victims and tokens the session then
// finds as those of any backend. Steps behind a sequence's end are never asked for.
//
// Tokens are the most likely ones. Nothing but victims, their scores and the chosen tokens can be read of
// decode steps: no q, k, v, attention, logits.
#pragma once

#include <memory>
#include <vector>

#include "core/ops/backend.h"
#include "kernels/gpu/ahead_device.h"

namespace kvlapse {

class AheadStore;

class AheadBackend final : public Backend {
 public:
  AheadBackend(std::unique_ptr<Backend> prompts, std::unique_ptr<AheadDevice> device)
      : description_(prompts->describe() + ", " + device->describe()),
        prompts_(std::move(prompts)),
        device_(std::move(device)) {}

  std::string describe() const override { return description_; }
  void prepare(const TransformerWeights& weights, int n_rows, DType kv_dtype) override;
  std::unique_ptr<KvStore> make_kv_store(const CacheGeometry& geometry, int query_window) override;
  OpBytes embed(std::span<const BatchRow> rows) override;
  OpBytes project_qkv(int layer) override;
  QkvRow qkv_row(int row) const override;
  bool queues_steps() const override { return true; }
  int64_t waited_ns() const override { return waited_ns_; }
  QkvRow host_row(int layer, int row) override;
  OpBytes attend(std::span<const AttendRow> attend) override;
  OpBytes attend_block(KvStore& store, int first_slots) override;
  OpBytes output_and_ffn(int layer) override;
  OpBytes head(std::span<const int> rows) override;
  void sample(std::span<const SampleRow> rows, std::span<SampleResult> results) override;
  std::span<const float> logits(int row) override;
  void parallel(int n, const std::function<void(int)>& task) override {
    for (int i = 0; i < n; ++i) task(i);
  }

 private:
  void begin();

  std::string description_;
  std::unique_ptr<Backend> prompts_;  // until decode begins
  std::unique_ptr<AheadDevice> device_;
  size_t n_layers_ = 0;
  std::vector<AheadStore*> stores_;  // [sequence, layer]
  std::vector<BatchRow> rows_;       // of the decode step in progress
  std::vector<AttendRow> attends_;   // [layers so far, rows]
  std::vector<int32_t> fed_;         // [sequence] token that the device feeds next
  AheadDevice::Step step_;
  int n_queued_ = 0;  // steps that were not taken
  bool decoding_ = false;
  int64_t waited_ns_ = 0;
};

}  // namespace kvlapse
