#include "tests/support/kernels/session_cases.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "core/base/rng.h"
#include "core/model/model_config.h"

namespace kvlapse {
namespace {

void add(std::vector<uint32_t>& to, const float* values, size_t n) {
  for (size_t i = 0; i < n; ++i) to.push_back(std::bit_cast<uint32_t>(values[i]));
}

void expect_same(const SessionWitness::Seen& a, const SessionWitness::Seen& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  for (const auto& [at, seen] : a)
    ASSERT_EQ(seen, b.at(at)) << what << ": sequence " << at[0] << " layer " << at[1] << " position "
                              << at[2];
}

}  // namespace

void SessionWitness::on_attended(int sequence, int layer, Pos pos, const TokenRows& rows,
                                 const SlotTable& table, LayerInputs& inputs) {
  const At at{sequence, layer, raw(pos)};
  const auto dim = static_cast<size_t>(geometry_.head_dim);
  add(q[at], rows.q, dim * geometry_.n_q_heads);
  add(k[at], rows.k, dim * geometry_.n_kv_heads);
  add(v[at], rows.v, dim * geometry_.n_kv_heads);
  if (!shows_attention_) return;
  for (int h = 0; h < geometry_.n_q_heads; ++h) {
    const auto n = static_cast<size_t>(table.count(geometry_.kv_head_of(h)));
    add(logits[at], inputs.logits(h).data(), n);
    add(attention[at], inputs.attention(h).data(), n);
    add(output[at], inputs.output(h).data(), dim);
  }
}

void SessionWitness::on_evicted(int sequence, int layer, const EvictionPlan& plan) {
  std::vector<uint32_t>& seen = plans[{sequence, layer, raw(plan.step)}];
  for (const Drop& d : plan.drops)
    seen.insert(seen.end(), {static_cast<uint32_t>(d.kv_head), static_cast<uint32_t>(raw(d.slot)),
                             static_cast<uint32_t>(raw(d.pos)), std::bit_cast<uint32_t>(d.score)});
  add(seen, plan.threshold.data(), plan.threshold.size());
  seen.push_back(static_cast<uint32_t>(plan.near_ties));
}

void SessionWitness::on_step(const StepSummary& s) {
  steps[{s.sequence, 0, raw(s.pos)}] = {static_cast<uint32_t>(s.token), static_cast<uint32_t>(s.next_token),
                                        std::bit_cast<uint32_t>(s.logprob),
                                        std::bit_cast<uint32_t>(s.margin)};
}

std::vector<SessionCase> policy_cases() {
  return {{"full", "100%", DType::f32, 0, true, 40},
          {"full", "100%", DType::bf16, 0.8, true, 40},
          {"longflow", "12", DType::f32, 0, true, 60},
          {"longflow:granularity=kv_head:recent=3", "10", DType::f16, 0, false, 60},
          {"longflow", "25%", DType::bf16, 0.7, false, 100},
          {"random", "9", DType::f32, 0, false, 60},
          {"streaming_llm:sinks=2", "10", DType::bf16, 0, false, 60},
          {"streaming_llm:sinks=2:positions=cache", "10", DType::bf16, 0, true, 60},
          {"streaming_llm@kvpress:sinks=2:positions=cache:cadence=8", "16", DType::f32, 0.7, true, 60},
          {"h2o", "12", DType::f16, 0, false, 60},
          {"tova", "12", DType::f32, 0, false, 60},
          {"snapkv:cadence=8:window=4", "16", DType::f32, 0, false, 60},
          {"rkv:cadence=8:window=4", "16", DType::f32, 0, false, 60},
          {"adakv:cadence=8", "16", DType::f32, 0, false, 60},
          {"vatp", "48", DType::f32, 0, false, 60},
          {"caote", "32", DType::f32, 0, false, 60}};
}

SessionWitness run_session(Backend& backend, const Model& model, const SessionCase& c) {
  const std::unique_ptr<Policy> policy = make_policy(c.policy);
  SessionWitness witness(model.spec.cache_geometry(64, c.kv_dtype), c.attention);
  SessionOptions options;
  options.policy = policy.get();
  options.budget = parse_budget(c.budget);
  options.max_tokens = c.max_tokens;
  options.kv_dtype = c.kv_dtype;
  options.sampling.temperature = c.temperature;
  options.ignore_eos = true;
  options.prefill_block = 8;
  options.observers = {&witness};
  DecodeSession session(backend, model, options);
  for (int n : {3, 10}) {
    SequenceRequest request;
    for (int t = 0; t < n; ++t) request.prompt.push_back((t * 7 + n * 13 + t * t) % model.spec.n_vocab);
    request.seed = static_cast<uint64_t>(n);
    if (n == 3) request.max_tokens = c.max_tokens / 2;  // the batch shrinks
    session.add_sequence(std::move(request));
  }
  for (bool more = true; more;) {
    more = session.step();
    for (int s = 0; s < 2; ++s)
      if (session.sequence(s).live) add(witness.head, session.logits(s).data(), session.logits(s).size());
  }
  return witness;
}

void expect_same_session(const SessionWitness& a, const SessionWitness& b, const std::string& what) {
  expect_same(a.q, b.q, what + ", q");
  expect_same(a.k, b.k, what + ", k");
  expect_same(a.v, b.v, what + ", v");
  expect_same(a.logits, b.logits, what + ", attention logits");
  expect_same(a.attention, b.attention, what + ", attention weights");
  expect_same(a.output, b.output, what + ", attention output");
  expect_same(a.plans, b.plans, what + ", victims");
  expect_same(a.steps, b.steps, what + ", steps");
  EXPECT_EQ(a.head, b.head) << what << ", logits";
}

Model random_model(const RandomModelShape& s, uint64_t seed) {
  Model model;
  ModelSpec& spec = model.spec;
  spec.name = "random";
  spec.n_vocab = s.n_vocab, spec.width = s.width, spec.ffn_width = s.ffn_width, spec.n_layers = s.n_layers;
  spec.context = 256;
  spec.layer = {LayerKind::full, s.n_q_heads, s.n_kv_heads, s.head_dim};
  spec.tied_embeddings = s.tied, spec.qkv_bias = s.qkv_bias, spec.qk_norm = s.qk_norm;

  auto number = [&seed](float scale) { return (unit_float(mix64(seed++)) - 0.5f) * scale; };
  auto matrix = [&](int rows, int columns) {
    const size_t n = static_cast<size_t>(rows) * columns, bytes = s.type == TensorType::f32 ? 4 : 2;
    model.weights.owned.push_back(std::make_unique<std::byte[]>(n * bytes));
    std::byte* data = model.weights.owned.back().get();
    for (size_t i = 0; i < n; ++i) {
      const float value = number(4.0f / std::sqrt(static_cast<float>(columns)));
      const uint16_t half = s.type == TensorType::f16 ? f32_to_f16(value) : f32_to_bf16(value);
      std::memcpy(data + i * bytes, s.type == TensorType::f32 ? static_cast<const void*>(&value) : &half,
                  bytes);
    }
    return Matrix{s.type, rows, columns, data};
  };
  auto vector = [&](int n, float around) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = around + number(0.5f);
    return values;
  };
  TransformerWeights& t = model.weights.transformer;
  t.n_vocab = s.n_vocab, t.width = s.width, t.ffn_width = s.ffn_width;
  t.n_q_heads = s.n_q_heads, t.n_kv_heads = s.n_kv_heads, t.head_dim = s.head_dim;
  t.rope = rope_table(spec.rope, s.head_dim);
  t.embedding = matrix(s.n_vocab, s.width);
  t.head = s.tied ? t.embedding : matrix(s.n_vocab, s.width);
  t.final_norm = vector(s.width, 1);
  const int q_rows = s.n_q_heads * s.head_dim, kv_rows = s.n_kv_heads * s.head_dim;
  for (int i = 0; i < s.n_layers; ++i) {
    LayerWeights& l = t.layers.emplace_back();
    l.input_norm = vector(s.width, 1), l.ffn_norm = vector(s.width, 1);
    if (s.qk_norm) l.q_norm = vector(s.head_dim, 1), l.k_norm = vector(s.head_dim, 1);
    if (s.qkv_bias)
      l.q_bias = vector(q_rows, 0), l.k_bias = vector(kv_rows, 0), l.v_bias = vector(kv_rows, 0);
    l.q = matrix(q_rows, s.width), l.k = matrix(kv_rows, s.width), l.v = matrix(kv_rows, s.width);
    l.o = matrix(s.width, q_rows);
    l.gate = matrix(s.ffn_width, s.width), l.up = matrix(s.ffn_width, s.width);
    l.down = matrix(s.width, s.ffn_width);
  }
  return model;
}

}  // namespace kvlapse
