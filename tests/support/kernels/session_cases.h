// Sessions that are run on two backends and compared bit for bit: everything that observers are shown, tokens
// and logits.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/engine/decode_session.h"

namespace kvlapse {

// Everything that a session shows, as bits.
class SessionWitness final : public StepObserver {
 public:
  SessionWitness(const CacheGeometry& geometry, bool shows_attention)
      : geometry_(geometry), shows_attention_(shows_attention) {}
  void on_attended(int sequence, int layer, Pos pos, const TokenRows& rows, const SlotTable& table,
                   LayerInputs& inputs) override;
  void on_evicted(int sequence, int layer, const EvictionPlan& plan) override;
  void on_step(const StepSummary& s) override;

  using At = std::array<int, 3>;  // sequence, layer, position
  using Seen = std::map<At, std::vector<uint32_t>>;
  Seen q, k, v, logits, attention, output;  // of a layer's token
  Seen plans;                               // victims, scores, thresholds
  Seen steps;                               // tokens, logprob, margin
  std::vector<uint32_t> head;               // logits of every step, all sequences

 private:
  CacheGeometry geometry_;
  bool shows_attention_;
};

struct SessionCase {
  std::string policy = "full", budget = "100%";
  DType kv_dtype = DType::f32;
  double temperature = 0;
  bool attention = false;  // observers look at attention
  int max_tokens = 6;
};

// Policies of every kind, long enough to evict.
std::vector<SessionCase> policy_cases();

// Two sequences of different length, one of which ends earlier.
SessionWitness run_session(Backend& backend, const Model& model, const SessionCase& c);
void expect_same_session(const SessionWitness& a, const SessionWitness& b, const std::string& what);

struct RandomModelShape {
  int n_layers = 2, n_vocab = 50, width = 48, ffn_width = 80, n_q_heads = 4, n_kv_heads = 2, head_dim = 24;
  TensorType type = TensorType::bf16;
  bool qk_norm = true, qkv_bias = false, tied = false;
};
Model random_model(const RandomModelShape& shape, uint64_t seed);

}  // namespace kvlapse
