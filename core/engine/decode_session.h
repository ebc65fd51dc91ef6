// DecodeSession: the token loop. A batch of sequences with ragged lengths, each with one CacheSite per layer,
// is prefilled in blocks and then decoded one token a step for all that are live. Observers hear everything.
// Single thread of control; the backend brings its own threads. A sequence's tokens depend on its prompt,
// seed and teacher alone, never on what else is in the batch.
//
//   Model model = load_model(folder);
//   std::unique_ptr<Backend> backend = make_cpu_backend();
//   DecodeSession session(*backend, model, {.policy = policy.get(), .max_tokens = 2000});
//   session.add_sequence({.prompt = model.tokenizer->encode(text, SpecialTokens::parse), .seed = 1});
//   while (session.step()) {}
//   session.sequence(0).tokens
#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "core/engine/step_observer.h"
#include "core/model/model.h"
#include "core/ops/backend.h"
#include "core/policy/spec.h"

namespace kvlapse {

struct Sampling {
  double temperature = 0;  // 0: greedy
  int top_k = 0;           // 0: all
  double top_p = 1;
};

struct SessionOptions {
  const Policy* policy = nullptr;  // outlives the session
  Budget budget;          // a share is taken of prompt + max_tokens, at most the context; ignored by `full`
  int max_tokens = 4096;  // generated, per sequence
  DType kv_dtype = DType::f32;  // f32, f16 or bf16
  Sampling sampling;
  bool ignore_eos = false;
  int prefill_block = 64;                // tokens of a prompt that pass a layer together; changes no result
  std::vector<StepObserver*> observers;  // outlive the session
  const std::atomic<bool>* interrupt = nullptr;  // set: every live sequence ends as "interrupted"
};

struct SequenceRequest {
  std::vector<int32_t> prompt;
  uint64_t seed = 0;  // of sampling
  std::vector<int32_t>
      teacher;         // fed instead of the model's own choices; the sequence ends when they run out
  int max_tokens = 0;  // 0: the session's
};

// What a request comes to under a session's options.
struct RequestPlan {
  int max_tokens = 0;    // generated at most
  int total_tokens = 0;  // prompt and generation at most, within the context
  int budget_slots = 0;  // per kv head; 0 when the policy never evicts
};
// What add_sequence does first: throws Error for a prompt that is empty or longer than the context, an id
// outside the vocabulary, a budget below the protected set.
RequestPlan plan_request(const ModelSpec& spec, const SessionOptions& options,
                         const SequenceRequest& request);

struct SequenceState {
  std::vector<int32_t> tokens;  // prompt, then generation
  int n_prompt = 0;
  int n_fed = 0;          // tokens whose forward pass ran: their K/V were stored
  int budget_slots = 0;   // resolved; 0 when the policy never evicts
  int64_t evictions = 0;  // victims, all layers; one shared by the layer counts once
  bool live = true;
  std::string_view end_reason;  // "eos", "max_tokens", "context" or "interrupted" once it has ended

  int generated() const { return static_cast<int>(tokens.size()) - n_prompt; }
};

class DecodeSession {
 public:
  DecodeSession(Backend& backend, const Model& model, SessionOptions options);
  ~DecodeSession();
  DecodeSession(const DecodeSession&) = delete;
  DecodeSession& operator=(const DecodeSession&) = delete;

  // Before the first step. Returns the sequence's number. Throws Error: prompt empty or longer than the
  // context, id outside the vocabulary, budget below the protected set.
  int add_sequence(SequenceRequest request);
  // The first call prefills every prompt and chooses each one's first token; every further call feeds the
  // newest token of all live sequences and chooses the next. False when none is live any more.
  bool step();

  int n_sequences() const;
  const SequenceState& sequence(int sequence) const;
  // Cache of one layer, for tests and for what a caller wants to show.
  const SlotTable& table(int sequence, int layer) const;
  // Logits [V] behind the newest chosen token of a live sequence; valid until the next step.
  std::span<const float> logits(int sequence) const;
  // Totals since the session began, by phase, whole batch.
  const std::array<int64_t, kStepPhases>& phase_ns() const;
  OpBytes moved() const;  // modelled
  int64_t now_ns() const;  // since the session began, the clock of StepSummary::start_ns; any thread

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvlapse
