// The recorder behind a real decode of the built-in model: what the trace says is what happened.
#include "trace/recorder.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <filesystem>
#include <map>

#include "core/base/error.h"
#include "core/engine/decode_session.h"
#include "core/task/task.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/trace/synthetic_trace.h"
#include "trace/trace_reader.h"
#include "trace/verify.h"

namespace kvlapse {
namespace {

namespace fs = std::filesystem;

// Keeps what it is shown, for comparison.
class Witness final : public StepObserver {
 public:
  struct Attended {
    std::vector<float> q, k, v;
    std::vector<std::vector<float>> attention;  // [Hq][n], generated tokens only
    std::vector<std::vector<Pos>> positions;    // [H][n]
  };
  Witness(const CacheGeometry& geometry, int layer) : geometry_(geometry), layer_(layer) {}

  void on_prompt(int, std::span<const int32_t> ids) override { n_prompt_ = static_cast<int>(ids.size()); }
  void on_attended(int sequence, int layer, Pos pos, const TokenRows& rows, const SlotTable& table,
                   LayerInputs& inputs) override {
    if (sequence != 0 || layer != layer_) return;
    const CacheGeometry& g = geometry_;
    Attended& a = attended[raw(pos)];
    a.q.assign(rows.q, rows.q + g.n_q_heads * g.head_dim);
    a.k.assign(rows.k, rows.k + g.n_kv_heads * g.head_dim);
    a.v.assign(rows.v, rows.v + g.n_kv_heads * g.head_dim);
    if (raw(pos) < n_prompt_) return;
    for (int q = 0; q < g.n_q_heads; ++q) {
      const std::span<const float> weights = inputs.attention(q);
      a.attention.emplace_back(weights.begin(), weights.end());
    }
    for (int h = 0; h < g.n_kv_heads; ++h) {
      const std::span<const Pos> positions = table.positions(h);
      a.positions.emplace_back(positions.begin(), positions.end());
    }
  }
  void on_evicted(int sequence, int layer, const EvictionPlan& plan) override {
    if (sequence == 0 && layer == layer_) plans.push_back(plan);
  }
  void on_step(const StepSummary& summary) override {
    if (summary.sequence == 0) steps.push_back(summary);
  }

  std::map<int, Attended> attended;
  std::vector<EvictionPlan> plans;
  std::vector<StepSummary> steps;

 private:
  CacheGeometry geometry_;
  int layer_, n_prompt_ = 0;
};

class RecorderTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    model_ = new Model(load_model(fs::path(KVLAPSE_MODELS) / "reasoner-6m"));
    backend_ = make_cpu_backend(1).release();
  }
  static void TearDownTestSuite() {
    delete model_;
    delete backend_;
  }

  TraceHeader header(const Policy& policy, int budget, TraceTier tier, DType dtype, int n_sequences) {
    TraceHeader h;
    h.geometry = model_->spec.cache_geometry(4096, dtype);
    h.tier = tier;
    h.layer_end = tier == TraceTier::events ? 0 : h.geometry.n_layers;
    h.policy = describe_policy(policy, budget, h.geometry.n_layers);
    h.budget_text = std::to_string(budget);
    h.budget_slots = policy.info().evicts ? budget : 0;
    h.rope_theta = model_->spec.rope.theta;
    h.n_sequences = n_sequences;
    return h;
  }

  // Records `n_tokens` generated tokens of each sequence; the witness watches sequence 0.
  void record(const std::string& policy_spec, TraceTier tier, DType dtype, int n_tokens,
              int n_sequences = 1) {
    policy_ = make_policy(policy_spec);
    constexpr int kBudget = 160;
    const TraceHeader h = header(*policy_, kBudget, tier, dtype, n_sequences);
    file_ = folder_ / "a.kvl";
    recorder_ = std::make_unique<Recorder>(file_, h, TraceWriterOptions{.force = true});
    witness_ = std::make_unique<Witness>(h.geometry, 2);
    SessionOptions options;
    options.policy = policy_.get();
    options.budget = parse_budget(std::to_string(kBudget));
    options.max_tokens = n_tokens;
    options.kv_dtype = dtype;
    options.ignore_eos = true;
    options.observers = {recorder_.get(), witness_.get()};
    DecodeSession session(*backend_, *model_, options);
    for (int s = 0; s < n_sequences; ++s) {
      const TaskProblem problem = make_task_problem(longest_task_family(), static_cast<uint64_t>(s));
      SequenceRequest request;
      request.prompt = model_->tokenizer->encode(problem.prompt, SpecialTokens::parse);
      const int id = session.add_sequence(std::move(request));
      recorder_->set_sequence(id, static_cast<uint64_t>(s), session.sequence(id).budget_slots);
    }
    while (session.step()) {
    }
    tokens_ = session.sequence(0).tokens;
    n_fed_ = session.sequence(0).n_fed;
    recorder_->finish(/*interrupted=*/false);
    const VerifyReport report = verify_trace(file_);
    ASSERT_TRUE(report.ok()) << report.violations.front();
  }

  static Model* model_;
  static Backend* backend_;
  test::TemporaryFolder folder_;
  fs::path file_;
  std::unique_ptr<Policy> policy_;
  std::unique_ptr<Recorder> recorder_;
  std::unique_ptr<Witness> witness_;
  std::vector<int32_t> tokens_;
  int n_fed_ = 0;
};
Model* RecorderTest::model_ = nullptr;
Backend* RecorderTest::backend_ = nullptr;

TEST_F(RecorderTest, TokensStepsAndRowsAreTheSessionsOwn) {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    record("longflow", TraceTier::qkv, dtype, 120);
    TraceReader reader(file_);
    ASSERT_EQ(reader.n_steps(0), n_fed_);
    EXPECT_EQ(reader.sequence(0).tokens, tokens_);
    const std::vector<TraceStep> steps = reader.steps(0, 0, n_fed_);
    ASSERT_EQ(steps.size(), witness_->steps.size());
    for (size_t i = 0; i < steps.size(); ++i) {
      EXPECT_EQ(steps[i].summary.pos, witness_->steps[i].pos);
      EXPECT_EQ(steps[i].summary.margin, witness_->steps[i].margin);
      EXPECT_EQ(steps[i].summary.phase_ns, witness_->steps[i].phase_ns);
    }
    for (const auto& [pos, attended] : witness_->attended) {
      std::vector<float> q(attended.q.size()), k(attended.k.size()), v(attended.v.size());
      reader.read_rows(0, 2, RowKind::q, pos, 1, q.data());
      reader.read_rows(0, 2, RowKind::k, pos, 1, k.data());
      reader.read_rows(0, 2, RowKind::v, pos, 1, v.data());
      ASSERT_EQ(q, attended.q) << dtype_name(dtype) << " " << pos;
      ASSERT_EQ(k, attended.k) << dtype_name(dtype) << " " << pos;
      ASSERT_EQ(v, attended.v) << dtype_name(dtype) << " " << pos;
    }
  }
}

TEST_F(RecorderTest, EvictionsAreThePlans) {
  for (const char* spec : {"longflow", "random", "streaming_llm"}) {
    record(spec, TraceTier::events, DType::bf16, 150);
    TraceReader reader(file_);
    const std::vector<TraceEviction> evictions = reader.evictions(0, 2, 0, n_fed_);
    size_t next = 0;
    for (const EvictionPlan& plan : witness_->plans)
      for (const Drop& drop : plan.drops) {
        ASSERT_LT(next, evictions.size());
        const TraceEviction& e = evictions[next++];
        EXPECT_EQ(e.step, raw(plan.step));
        EXPECT_EQ(e.pos, raw(drop.pos));
        EXPECT_EQ(e.slot, raw(drop.slot));
        EXPECT_EQ(e.kv_head, drop.kv_head);
        EXPECT_EQ(e.score, drop.score);
        EXPECT_EQ(e.threshold, plan.threshold[std::max(0, drop.kv_head)]);
      }
    EXPECT_EQ(next, evictions.size());
    EXPECT_GT(next, 100u);
  }
}

TEST_F(RecorderTest, SketchIsTheTopOfTheGroupsMeanAttention) {
  record("longflow", TraceTier::sketch, DType::f32, 150);
  TraceReader reader(file_);
  const CacheGeometry& g = reader.header().geometry;
  int first = 0;
  const std::vector<SketchRow> rows = reader.sketches(0, 2, 0, n_fed_, &first);
  bool unknown = false;
  for (size_t i = 0; i < rows.size(); ++i) {
    const int pos = first + static_cast<int>(i) / g.n_kv_heads, h = static_cast<int>(i) % g.n_kv_heads;
    const Witness::Attended& attended = witness_->attended.at(pos);
    const size_t n = attended.positions[h].size();
    std::vector<std::pair<double, int>> mean(n);
    double entropy = 0, total = 0;
    for (size_t s = 0; s < n; ++s) {
      double p = 0;
      for (int q = h * g.group(); q < (h + 1) * g.group(); ++q) {
        const double weight = attended.attention[q][s];
        p += weight / g.group();
        if (weight > 0) entropy -= weight * std::log(weight) / g.group();
      }
      mean[s] = {p, raw(attended.positions[h][s])};
      total += p;
    }
    std::sort(mean.rbegin(), mean.rend());
    ASSERT_NEAR(total, 1, 1e-4);
    ASSERT_NEAR(rows[i].entropy, entropy, 1e-4) << pos;
    for (int t = 0; t < std::min<int>(kSketchTop, static_cast<int>(n)); ++t) {
      ASSERT_NEAR(rows[i].weight[t], mean[t].first, 1e-6) << pos << " rank " << t;
      // Ranks may swap where weights are all but equal.
      if (t + 1 < static_cast<int>(n) && mean[t].first - mean[t + 1].first > 1e-6 &&
          (t == 0 || mean[t - 1].first - mean[t].first > 1e-6)) {
        ASSERT_EQ(rows[i].pos[t], mean[t].second);
      }
    }
    unknown |= std::isnan(rows[i].recall);
  }
  EXPECT_EQ(rows.front().recall, 1.0f);
  EXPECT_TRUE(unknown);
}

TEST_F(RecorderTest, ABatchIsOneTraceByRows) {
  record("random", TraceTier::qkv, DType::bf16, 70, 3);
  TraceReader reader(file_);
  EXPECT_EQ(reader.n_sequences(), 3);
  EXPECT_EQ(reader.sequence(0).tokens, tokens_);
  EXPECT_EQ(reader.sequence(2).seed, 2u);
  EXPECT_EQ(reader.sequence(2).end_reason, "max_tokens");
  EXPECT_NE(reader.sequence(1).tokens, reader.sequence(2).tokens);
}

TEST_F(RecorderTest, InterruptedBeforeAPromptLeavesAValidTrace) {
  policy_ = make_policy("full");
  file_ = folder_ / "a.kvl";
  Recorder recorder(file_, header(*policy_, 0, TraceTier::qkv, DType::bf16, 2));
  std::atomic<bool> interrupt = true;
  SessionOptions options;
  options.policy = policy_.get();
  options.kv_dtype = DType::bf16;
  options.observers = {&recorder};
  options.interrupt = &interrupt;
  DecodeSession session(*backend_, *model_, options);
  SequenceRequest request;
  request.prompt = model_->tokenizer->encode("1+1", SpecialTokens::parse);
  session.add_sequence(request);
  session.add_sequence(request);
  while (session.step()) {
  }
  TraceSequence facts;
  facts.sequence = 1;
  recorder.describe_sequence(facts);
  recorder.finish(/*interrupted=*/true);
  EXPECT_TRUE(verify_trace(file_).ok());
  EXPECT_EQ(TraceReader(file_).n_sequences(), 0);
}

TEST_F(RecorderTest, OverheadIsMeasuredAndStored) {
  record("full", TraceTier::sketch, DType::f32, 100);
  TraceReader reader(file_);
  const double stored = std::stod(reader.meta().at("overhead_ratio"));
  EXPECT_NEAR(stored, recorder_->overhead_ratio(), 1e-6);
  EXPECT_GT(stored, 0);
  EXPECT_GT(std::stoll(reader.meta().at("decode_ns")), std::stoll(reader.meta().at("recorder_ns")));
}

TEST_F(RecorderTest, ExpectedSizeIsNearTheRealOne) {
  for (TraceTier tier : {TraceTier::sketch, TraceTier::qkv}) {
    record("random", tier, DType::bf16, 400);
    const TraceReader reader(file_);
    const double expected =
        static_cast<double>(estimate_trace_bytes(reader.header(), n_fed_, reader.sequence(0).n_prompt));
    const double found = static_cast<double>(fs::file_size(file_));
    EXPECT_NEAR(expected / found, 1, 0.25) << tier_name(tier);
  }
}

}  // namespace
}  // namespace kvlapse
