// GraphDecoder: the fast decode step: bf16 weights and K/V, fp32 sums in whatever order is fast, attention
// with the fused step (append, attend, score, next victim), the whole step of all layers one CUDA graph in
// which each chosen token feeds the next step, so that nothing waits for the host. Matrix products on sm_90:
// of up to kChainMostRows sequences one launch between two attentions (kernels/decode/chain_args.h), of up to
// kProductMostRows a launch each (kernels/decode/product_args.h). Otherwise cuBLASLt for batches above
// kGemvMostRows, and own matrix-vector kernels.
//
// With n_reports steps are read as AheadDevice says: the last kernel of a step writes what it chose into host
// memory, in a ring of so many steps, and the device goes on.
//
// Results agree with the exact backend within rounding, not bit for bit. Weights come from a model, or are
// random by seed, made on the device. One thread; the current device. Where the products are one launch its
// blocks wait for each other, one a multiprocessor: one such decoder runs on a device at a time, and nothing
// beside it may hold multiprocessors for good.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/ops/weights.h"
#include "kernels/cuda/launch.h"
#include "kernels/decode/decode_args.h"
#include "kernels/gpu/ahead_device.h"

namespace kvlapse {

struct DecoderShape {
  int n_layers = 0, n_vocab = 0, width = 0, ffn_width = 0;
  int n_q_heads = 0, n_kv_heads = 0, head_dim = 0;
  float norm_eps = 1e-6f;
  bool qk_norm = false, qkv_bias = false, tied = false;
  RopeTable rope;
};
DecoderShape shape_of(const TransformerWeights& weights);

struct GraphDecoderOptions {
  int batch = 1;
  int n_slots = 0;                      // capacity of a kv head
  int n_positions = 0;                  // at most so many tokens
  FusedScore score = FusedScore::none;  // none: every token is kept and n_slots must hold them
  bool shared = false;                  // a layer's heads share their victim
  int recent = 1;                       // newest tokens that are no victims
  int n_reports = 0;                    // steps that wait for take() at most; 0: none is reported
};

class GraphDecoder final : public AheadDevice {
 public:
  // Random weights of deviation 1 / sqrt(columns). Throws Error: shape without a kernel, memory.
  GraphDecoder(const DecoderShape& shape, const GraphDecoderOptions& options, uint64_t seed);
  // A model's weights, rounded to bf16.
  GraphDecoder(const TransformerWeights& weights, const GraphDecoderOptions& options);
  ~GraphDecoder() override;
  GraphDecoder(const GraphDecoder&) = delete;
  GraphDecoder& operator=(const GraphDecoder&) = delete;

  // Every sequence holds `tokens` tokens of random K and V; the next one stands at that position.
  void fill_cache(int tokens, uint64_t seed);
  // The tokens that the next step feeds, [B]; the step's own choice otherwise.
  void set_tokens(const std::vector<int32_t>& tokens);
  // Queues n steps.
  void run(int n);
  // Milliseconds of each of n steps, measured one by one on the device.
  std::vector<double> time_steps(int n);
  // Tokens that the last step chose, [B]; waits for it.
  std::vector<int32_t> tokens();
  std::vector<float> logits();  // [B, V] of the last step

  std::string describe() const override;
  int n_sequences() const override;
  int victims_a_layer() const override;
  void hold(const Held& held) override;
  void begin(const std::vector<int32_t>& tokens, const std::vector<int32_t>& positions) override;
  void queue() override;
  int max_ahead() const override;
  Step take() override;

  uint64_t weight_bytes() const;  // that a step reads; the embedding's rows aside
  uint64_t kv_bytes() const;      // that the next step reads
  std::string products() const;   // what multiplies: "chain", "product", "cublasLt", "gemv"
  int n_splits() const;
  std::vector<LaunchRecord> launches();  // of one step, with the bytes that each should move

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvlapse
