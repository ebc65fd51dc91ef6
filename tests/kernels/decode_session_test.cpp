// The engine end to end on a tiny random Qwen3 checkpoint: against transformers, against itself under every
// split of the work, and under eviction.
#include "core/engine/decode_session.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/base/error.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvlapse {
namespace {

using testing::HasSubstr;
using Ids = std::vector<int32_t>;

Ids read_ids(const TensorFile& file, const std::string& name) {
  const TensorView& t = file.get(name);
  Ids ids(t.elements());
  std::memcpy(ids.data(), t.data, t.bytes);
  return ids;
}

Ids some_prompt(int n, int salt = 0) {
  Ids ids;
  for (int i = 0; i < n; ++i) ids.push_back((i * 7 + salt * 13 + i * i) % 64);
  return ids;
}

template <typename F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    return e.what();
  }
  return "no error";
}

class Decode : public testing::Test {
 protected:
  static const Model& model() {
    static const Model loaded = load_model(KVLAPSE_TEST_DATA "/tiny_qwen3");
    return loaded;
  }

  struct Run {
    std::vector<Ids> tokens;
    std::vector<std::vector<uint32_t>> logit_bits;  // per sequence, all steps in a row
    std::vector<SequenceState> states;
  };

  struct Setup {
    std::string policy = "full";
    std::string budget = "16";
    int threads = 2;
    SessionOptions options;
  };

  static Run run(Setup setup, const std::vector<SequenceRequest>& requests) {
    std::unique_ptr<Policy> policy = make_policy(setup.policy);
    std::unique_ptr<Backend> backend = make_cpu_backend(setup.threads);
    setup.options.policy = policy.get();
    setup.options.budget = parse_budget(setup.budget);
    DecodeSession session(*backend, model(), setup.options);
    for (const SequenceRequest& request : requests) session.add_sequence(request);
    Run result;
    result.logit_bits.resize(requests.size());
    std::vector<size_t> seen;
    for (const SequenceRequest& request : requests) seen.push_back(request.prompt.size());
    for (bool more = true; more;) {
      more = session.step();
      for (int i = 0; i < session.n_sequences(); ++i) {
        const size_t n = session.sequence(i).tokens.size();
        if (n == seen[i]) continue;
        seen[i] = n;
        for (float l : session.logits(i)) result.logit_bits[i].push_back(std::bit_cast<uint32_t>(l));
      }
    }
    for (int i = 0; i < session.n_sequences(); ++i) {
      result.states.push_back(session.sequence(i));
      result.tokens.push_back(session.sequence(i).tokens);
    }
    return result;
  }

  static std::vector<SequenceRequest> ragged_requests() {
    std::vector<SequenceRequest> requests;
    for (int n : {3, 40, 17, 66, 1}) requests.push_back({some_prompt(n, n), static_cast<uint64_t>(n), {}, 0});
    requests[2].max_tokens = 9;
    return requests;
  }

  static void expect_equal(const Run& a, const Run& b, const char* what) {
    EXPECT_EQ(a.tokens, b.tokens) << what;
    EXPECT_EQ(a.logit_bits, b.logit_bits) << what;
  }
};

TEST_F(Decode, GreedyTokensAndLogitsEqualTransformers) {
  std::unique_ptr<TensorFile> golden = open_safetensors(KVLAPSE_TEST_DATA "/tiny_qwen3_golden.safetensors");
  std::vector<SequenceRequest> requests;
  for (int i = 0; i < 4; ++i) requests.push_back({read_ids(*golden, fmt::format("prompt.{}", i)), 0, {}, 60});
  const Run result = run({}, requests);
  for (int i = 0; i < 4; ++i) {
    const Ids expected = read_ids(*golden, fmt::format("tokens.{}", i));
    EXPECT_EQ(Ids(result.tokens[i].begin() + result.states[i].n_prompt, result.tokens[i].end()), expected);
    const TensorView& logits = golden->get(fmt::format("logits.{}", i));
    ASSERT_EQ(static_cast<size_t>(logits.elements()), result.logit_bits[i].size());
    std::vector<float> reference(logits.elements());
    std::memcpy(reference.data(), logits.data, logits.bytes);
    for (size_t k = 0; k < reference.size(); ++k)
      ASSERT_NEAR(std::bit_cast<float>(result.logit_bits[i][k]), reference[k], 5e-4)
          << "prompt " << i << " value " << k;
  }
}

TEST_F(Decode, NoSplitOfTheWorkChangesABit) {
  for (const char* policy : {"full", "longflow", "streaming_llm:sinks=2"})
    for (DType kv : {DType::f32, DType::f16, DType::bf16}) {
      Setup setup{.policy = policy, .budget = "24", .threads = 1, .options = {}};
      setup.options.max_tokens = 20;
      setup.options.kv_dtype = kv;
      const Run base = run(setup, ragged_requests());
      Setup threads = setup;
      threads.threads = 3;
      expect_equal(base, run(threads, ragged_requests()), "threads");
      for (int block : {1, 5, 300}) {
        Setup blocks = setup;
        blocks.options.prefill_block = block;
        expect_equal(base, run(blocks, ragged_requests()), "prefill block");
      }
      Run alone;
      for (const SequenceRequest& request : ragged_requests()) {
        Run one = run(setup, {request});
        alone.tokens.push_back(one.tokens[0]);
        alone.logit_bits.push_back(one.logit_bits[0]);
      }
      expect_equal(base, alone, "batch");
    }
}

TEST_F(Decode, PrefillEqualsDecodeOfTheSameTokens) {
  Setup setup;
  setup.options.max_tokens = 30;
  SequenceRequest request{some_prompt(50), 0, {}, 0};
  const Run generated = run(setup, {request});
  // The first 20 generated tokens become prompt; what follows must not notice.
  request.prompt.assign(generated.tokens[0].begin(), generated.tokens[0].begin() + 70);
  request.max_tokens = 10;
  const Run longer = run(setup, {request});
  EXPECT_EQ(longer.tokens[0], generated.tokens[0]);
  const std::vector<uint32_t> tail(generated.logit_bits[0].end() - 10 * 64, generated.logit_bits[0].end());
  EXPECT_EQ(longer.logit_bits[0], tail);
}

TEST_F(Decode, SamplingIsReproducibleAndObeysItsLimits) {
  Setup setup;
  setup.options.max_tokens = 60;
  setup.options.sampling = {.temperature = 1.5, .top_k = 0, .top_p = 0.95};
  const Run first = run(setup, ragged_requests());
  expect_equal(first, run(setup, ragged_requests()), "again");
  std::vector<SequenceRequest> other = ragged_requests();
  for (SequenceRequest& r : other) r.seed += 1;
  EXPECT_NE(run(setup, other).tokens, first.tokens);

  setup.options.sampling = {};
  const Run greedy = run(setup, ragged_requests());
  setup.options.sampling = {.temperature = 2, .top_k = 1, .top_p = 1};
  EXPECT_EQ(run(setup, other).tokens, greedy.tokens);
  setup.options.sampling = {.temperature = 2, .top_k = 0, .top_p = 1e-6};
  EXPECT_EQ(run(setup, other).tokens, greedy.tokens);
}

// Counts what a session tells and checks what eviction leaves.
class Watcher final : public StepObserver {
 public:
  Watcher(int peak, bool wants_attention) : peak_(peak), wants_attention_(wants_attention) {}
  bool wants_prompt_attention() const override { return wants_attention_; }
  void on_prompt(int, std::span<const int32_t> ids) override { n_prompt = static_cast<int>(ids.size()); }
  void on_attended(int, int layer, Pos pos, const TokenRows& rows, const SlotTable& table,
                   LayerInputs& inputs) override {
    ++attended;
    EXPECT_NE(rows.q, nullptr);
    const bool generated = raw(pos) >= n_prompt;
    if (generated) {
      EXPECT_LE(table.max_count(), peak_);
    }
    if (generated || wants_attention_) {
      float total = 0;
      for (float w : inputs.attention(0)) total += w;
      EXPECT_NEAR(total, 1.0f, 1e-4f) << "layer " << layer << " position " << raw(pos);
      EXPECT_EQ(inputs.attention(0).size(), static_cast<size_t>(table.count(0)));
    }
  }
  void on_evicted(int, int, const EvictionPlan& plan) override {
    evictions += static_cast<int>(plan.drops.size());
  }
  void on_step(const StepSummary& s) override {
    ++steps;
    EXPECT_GE(s.total_ns, 0);
    EXPECT_LE(s.logprob, 0);
    last_margin = s.margin;
  }
  void on_end(int, std::string_view reason) override { end_reason = reason; }

  int n_prompt = 0, attended = 0, steps = 0, evictions = 0;
  float last_margin = 0;
  std::string end_reason;

 private:
  int peak_;
  bool wants_attention_;
};

TEST_F(Decode, LiveEvictionKeepsTheBudget) {
  for (const char* policy : {"longflow", "random:seed=3"})
    for (bool wants_attention : {false, true})
      for (int n_prompt : {5, 90}) {
        Watcher watcher(24, wants_attention);
        Setup setup{.policy = policy, .budget = "24", .threads = 2, .options = {}};
        setup.options.max_tokens = 50;
        setup.options.observers = {&watcher};
        const Run result = run(setup, {{some_prompt(n_prompt), 0, {}, 0}});
        EXPECT_EQ(result.states[0].budget_slots, 24);
        EXPECT_EQ(result.states[0].evictions, watcher.evictions);
        EXPECT_GT(watcher.evictions, 0) << policy;
        EXPECT_EQ(watcher.steps, 50);
        EXPECT_EQ(watcher.attended, (n_prompt + 49) * 2);
        EXPECT_EQ(result.states[0].n_fed, n_prompt + 49);
        EXPECT_EQ(watcher.end_reason, "max_tokens");
        // Watching changes nothing.
        setup.options.observers = {};
        expect_equal(result, run(setup, {{some_prompt(n_prompt), 0, {}, 0}}), policy);
      }
}

TEST_F(Decode, ABudgetThatIsNeverReachedIsTheFullCache) {
  Setup setup;
  setup.options.max_tokens = 40;
  const Run full = run(setup, ragged_requests());
  setup.policy = "longflow";
  setup.budget = "200";
  expect_equal(full, run(setup, ragged_requests()), "longflow");
  setup.budget = "20";
  EXPECT_NE(run(setup, ragged_requests()).logit_bits, full.logit_bits);
}

TEST_F(Decode, AShareIsTakenOfPromptAndMaxTokens) {
  Setup setup{.policy = "longflow", .budget = "25%", .threads = 1, .options = {}};
  setup.options.max_tokens = 60;
  EXPECT_EQ(run(setup, {{some_prompt(60), 0, {}, 0}}).states[0].budget_slots, 30);
  setup.options.max_tokens = 5000;  // the full cache cannot exceed the context of 256
  EXPECT_EQ(run(setup, {{some_prompt(60), 0, {}, 0}}).states[0].budget_slots, 64);
}

TEST_F(Decode, TeacherForcingFeedsTheGivenTokens) {
  Setup setup;
  setup.options.max_tokens = 40;
  const Run full = run(setup, {{some_prompt(30), 0, {}, 0}});
  const Ids teacher(full.tokens[0].begin() + 30, full.tokens[0].end());

  setup.policy = "longflow";
  setup.budget = "20";
  setup.options.max_tokens = 1000;
  const Run forced = run(setup, {{some_prompt(30), 0, teacher, 0}});
  EXPECT_EQ(forced.tokens, full.tokens);
  EXPECT_GT(forced.states[0].evictions, 0);
  EXPECT_NE(forced.logit_bits, full.logit_bits);
  EXPECT_EQ(forced.states[0].end_reason, "max_tokens");

  // Under the full cache a forced token that the model would not have chosen has a negative lead.
  Watcher watcher(256, false);
  setup.policy = "full";
  setup.options.observers = {&watcher};
  run(setup, {{some_prompt(30), 0, teacher, 0}});
  EXPECT_GE(watcher.last_margin, 0);
  Ids odd = teacher;
  odd.back() = (odd.back() + 1) % 64;
  run(setup, {{some_prompt(30), 0, odd, 0}});
  EXPECT_LT(watcher.last_margin, 0);
}

TEST_F(Decode, EndsForTheRightReason) {
  Setup setup;
  setup.options.max_tokens = 1000;
  Run result =
      run(setup, {{some_prompt(30), 0, {}, 0}, {some_prompt(255), 0, {}, 0}, {some_prompt(9), 0, {}, 3}});
  EXPECT_EQ(result.states[0].end_reason, "context");
  EXPECT_EQ(result.tokens[0].size(), 256u);
  EXPECT_EQ(result.states[1].generated(), 1);
  EXPECT_EQ(result.states[2].end_reason, "max_tokens");

  std::atomic<bool> interrupt{true};
  setup.options.interrupt = &interrupt;
  result = run(setup, {{some_prompt(30), 0, {}, 0}});
  EXPECT_EQ(result.states[0].end_reason, "interrupted");
  EXPECT_EQ(result.states[0].generated(), 0);
}

TEST_F(Decode, EndOfTextEndsUnlessIgnored) {
  Setup setup;
  setup.options.max_tokens = 40;
  const Run plain = run(setup, {{some_prompt(30), 0, {}, 0}});
  Model stops = load_model(KVLAPSE_TEST_DATA "/tiny_qwen3");
  stops.spec.eos_ids = {plain.tokens[0][30 + 7]};
  const auto first = std::find(plain.tokens[0].begin() + 30, plain.tokens[0].end(), stops.spec.eos_ids[0]);
  std::unique_ptr<Policy> policy = make_policy("full");
  std::unique_ptr<Backend> backend = make_cpu_backend(1);
  for (bool ignore : {false, true}) {
    SessionOptions options;
    options.policy = policy.get();
    options.max_tokens = 40;
    options.ignore_eos = ignore;
    DecodeSession session(*backend, stops, options);
    session.add_sequence({some_prompt(30), 0, {}, 0});
    while (session.step()) {
    }
    EXPECT_EQ(session.sequence(0).end_reason, ignore ? "max_tokens" : "eos");
    EXPECT_EQ(session.sequence(0).tokens, ignore ? plain.tokens[0] : Ids(plain.tokens[0].begin(), first + 1));
  }
}

TEST_F(Decode, IntegerProductsAreCloseAndAsReproducible) {
  const Model quantised = load_model(KVLAPSE_TEST_DATA "/tiny_models/gguf_q4_1.gguf");
  std::unique_ptr<Policy> policy = make_policy("full");
  auto logits_of = [&](int threads, MatmulMode mode, const std::vector<Ids>& prompts) {
    std::unique_ptr<Backend> backend = make_cpu_backend(threads, mode);
    SessionOptions options;
    options.policy = policy.get();
    options.max_tokens = 12;
    options.ignore_eos = true;
    DecodeSession session(*backend, quantised, options);
    for (const Ids& prompt : prompts) session.add_sequence({prompt, 0, Ids(12, 5), 0});
    std::vector<float> all;  // of the first sequence
    for (bool more = true; more;) {
      more = session.step();
      for (float l : session.logits(0)) all.push_back(l);
    }
    return all;
  };
  const Ids prompt = {3, 1, 4, 1, 5}, other = {9, 2, 6};
  const std::vector<float> fast = logits_of(1, MatmulMode::int16, {prompt});
  EXPECT_EQ(fast, logits_of(3, MatmulMode::int16, {prompt}));
  EXPECT_EQ(fast, logits_of(2, MatmulMode::int16, {prompt, other, other, other, other}));
  const std::vector<float> exact = logits_of(1, MatmulMode::exact, {prompt});
  EXPECT_NE(fast, exact);
  ASSERT_EQ(fast.size(), exact.size());
  for (size_t i = 0; i < fast.size(); ++i) EXPECT_NEAR(fast[i], exact[i], 2e-3);
}

TEST_F(Decode, RefusesWhatItCannotDo) {
  const Setup setup;
  EXPECT_THAT(error_of([&] {
                run(setup, {{some_prompt(256), 0, {}, 0}});
              }),
              HasSubstr("prompt: expected at most 255 tokens (the context of tiny_qwen3 is 256), found 256"));
  EXPECT_THAT(error_of([&] { run(setup, {{{}, 0, {}, 0}}); }), HasSubstr("expected at least 1 token"));
  EXPECT_THAT(error_of([&] {
                run(setup, {{{3, 64}, 0, {}, 0}});
              }),
              HasSubstr("token id: expected one of [0, 64), found 64"));
  EXPECT_THAT(error_of([&] { run(setup, {{{3, -1}, 0, {}, 0}}); }), HasSubstr("found -1"));
  Setup small{.policy = "streaming_llm:sinks=9", .budget = "8", .threads = 1, .options = {}};
  EXPECT_THAT(error_of([&] { run(small, {{some_prompt(9), 0, {}, 0}}); }), HasSubstr("budget 8 cannot hold"));
  Setup fp8;
  fp8.options.kv_dtype = DType::f8e4m3;
  EXPECT_THAT(error_of([&] { run(fp8, {{some_prompt(9), 0, {}, 0}}); }), HasSubstr("found fp8"));
}

}  // namespace
}  // namespace kvlapse
