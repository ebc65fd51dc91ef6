// A session over a device that runs ahead: the device here says what a session on the CPU decided, so that
// the session over it must show the same tokens and victims, however far the device is in front.
#include "kernels/gpu/ahead_backend.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <map>

#include "core/base/error.h"
#include "core/engine/decode_session.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvlapse {
namespace {

// What a session shows that a device ahead can be asked for.
struct Witness final : StepObserver {
  void on_evicted(int sequence, int layer, const EvictionPlan& plan) override {
    for (const Drop& d : plan.drops)
      drops[{sequence, layer, raw(plan.step)}].push_back(
          {d.kv_head, raw(d.slot), raw(d.pos), std::bit_cast<int>(d.score)});
  }
  void on_step(const StepSummary& s) override {
    steps[{s.sequence, raw(s.pos)}] = {s.next_token, std::bit_cast<int>(s.logprob),
                                       std::bit_cast<int>(s.margin)};
    if (s.sequence == 0 && raw(s.pos) == interrupts_at) interrupt = true;
  }
  void on_end(int sequence, std::string_view reason) override { ends[sequence] = reason; }

  std::map<std::array<int, 3>, std::vector<std::array<int, 4>>> drops;
  std::map<std::array<int, 2>, std::array<int, 3>> steps;
  std::map<int, std::string> ends;
  int interrupts_at = -1;  // position of the first sequence
  std::atomic<bool> interrupt{false};
};

class ScriptedDevice final : public AheadDevice {
 public:
  ScriptedDevice(const Witness& script, int n_sequences, int n_layers, int n_victims, int ahead)
      : script_(script), n_layers_(n_layers), n_victims_(n_victims), ahead_(ahead), choices_(n_sequences) {}

  std::string describe() const override { return "script"; }
  int n_sequences() const override { return static_cast<int>(choices_.size()); }
  int victims_a_layer() const override { return n_victims_; }
  void hold(const Held& held) override {
    ++n_held;
    EXPECT_EQ(held.keys.size() % held.positions.size(), 0u);
    EXPECT_EQ(held.keys.size(), held.values.size());
    EXPECT_GT(held.keys.size(), held.positions.size());
    EXPECT_EQ(held.value_l1.size(), held.positions.size());
    for (size_t i = 0; i < held.positions.size(); ++i) EXPECT_LT(raw(held.positions[i]), raw(held.next));
  }
  void begin(const std::vector<int32_t>&, const std::vector<int32_t>& positions) override {
    positions_ = positions;
  }
  void queue() override {
    ++n_queued_;
    most_ahead = std::max(most_ahead, n_queued_ - n_taken_);
  }
  int max_ahead() const override { return ahead_; }
  Step take() override {
    EXPECT_LT(n_taken_, n_queued_);
    victims_.assign(choices_.size() * n_layers_ * n_victims_, ~uint64_t{0});
    for (size_t s = 0; s < choices_.size(); ++s) {
      const int sequence = static_cast<int>(s), pos = positions_[s] + n_taken_;
      const auto step = script_.steps.find({sequence, pos});
      // Behind its end a sequence goes on with whatever it chooses.
      choices_[s] = step == script_.steps.end()
                        ? AheadChoice{1, -1, 0, 0}
                        : AheadChoice{step->second[0], std::bit_cast<float>(step->second[1]),
                                      std::bit_cast<float>(step->second[2]), 0};
      for (int layer = 0; layer < n_layers_; ++layer) {
        const auto drops = script_.drops.find({sequence, layer, pos});
        if (drops == script_.drops.end()) continue;
        for (const auto& [kv_head, slot, position, score] : drops->second)
          victims_[(s * n_layers_ + layer) * n_victims_ + std::max(kv_head, 0)] =
              static_cast<uint64_t>(static_cast<uint32_t>(score)) << 32 | static_cast<uint32_t>(slot);
      }
    }
    ++n_taken_;
    return {choices_, victims_};
  }

  int n_held = 0, most_ahead = 0;

 private:
  const Witness& script_;
  int n_layers_, n_victims_, ahead_, n_queued_ = 0, n_taken_ = 0;
  std::vector<AheadChoice> choices_;
  std::vector<uint64_t> victims_;
  std::vector<int32_t> positions_;
};

struct Settings {
  std::string policy, budget;
  int n_prompt = 10;
};

void run(Backend& backend, const Model& model, const Settings& settings, Witness& witness,
         float temperature = 0) {
  const std::unique_ptr<Policy> policy = make_policy(settings.policy);
  SessionOptions options;
  options.policy = policy.get();
  options.budget = parse_budget(settings.budget);
  options.max_tokens = 40;
  options.sampling.temperature = temperature;
  options.ignore_eos = true;
  options.interrupt = &witness.interrupt;
  options.observers = {&witness};
  DecodeSession session(backend, model, options);
  for (int n : {settings.n_prompt, 3}) {
    SequenceRequest request;
    for (int t = 0; t < n; ++t) request.prompt.push_back((t * 7 + n * 13 + t * t) % model.spec.n_vocab);
    if (n == 3) request.max_tokens = 17;  // ends while the device is ahead
    session.add_sequence(std::move(request));
  }
  while (session.step()) {
  }
}

TEST(AheadBackend, ASessionShowsWhatTheDeviceChose) {
  const Model model = load_model(KVLAPSE_TEST_DATA "/tiny_qwen3");
  const int n_layers = model.spec.n_layers, n_heads = model.spec.layer.n_kv_heads;
  // The longer prompt is cut to the budget before decode begins, or is not.
  for (const Settings& settings :
       {Settings{"full", "100%"}, Settings{"longflow", "16"}, Settings{"longflow", "8"},
        Settings{"longflow:granularity=kv_head:recent=3", "12"}, Settings{"tova", "14"}})
    for (int ahead : {1, 4}) {
      Witness expected, seen;
      run(*make_cpu_backend(2), model, settings, expected);
      const PolicyInfo& info = make_policy(settings.policy)->info();
      const int n_victims = !info.evicts ? 0 : info.rule.granularity == Granularity::layer ? 1 : n_heads;
      auto device = std::make_unique<ScriptedDevice>(expected, 2, n_layers, n_victims, ahead);
      const ScriptedDevice& script = *device;
      AheadBackend backend(make_cpu_backend(2), std::move(device));
      run(backend, model, settings, seen);
      EXPECT_EQ(seen.steps, expected.steps) << settings.policy;
      EXPECT_EQ(seen.drops, expected.drops) << settings.policy;
      EXPECT_EQ(seen.ends, expected.ends) << settings.policy;
      EXPECT_EQ(seen.drops.empty(), !info.evicts);
      EXPECT_EQ(script.n_held, 2 * n_layers * n_heads);
      EXPECT_EQ(script.most_ahead, ahead);
    }
}

// Steps that the device is in front with are not shown.
TEST(AheadBackend, AnInterruptEndsBehindTheStepThatWasShown) {
  const Model model = load_model(KVLAPSE_TEST_DATA "/tiny_qwen3");
  const Settings settings{"longflow", "8"};
  Witness expected, seen;
  run(*make_cpu_backend(2), model, settings, expected);
  AheadBackend backend(make_cpu_backend(2),
                       std::make_unique<ScriptedDevice>(expected, 2, model.spec.n_layers, 1, 4));
  seen.interrupts_at = settings.n_prompt + 4;
  run(backend, model, settings, seen);
  EXPECT_EQ(seen.ends, (std::map<int, std::string>{{0, "interrupted"}, {1, "interrupted"}}));
  for (const auto& [at, step] : seen.steps) {
    EXPECT_EQ(step, expected.steps.at(at));
    if (at[0] == 0) {
      EXPECT_LE(at[1], seen.interrupts_at);
    }
  }
  for (const auto& [at, drops] : seen.drops) EXPECT_EQ(drops, expected.drops.at(at));
  EXPECT_LT(seen.steps.size(), expected.steps.size());
}

TEST(AheadBackend, OtherChoicesOfTokensAreRefused) {
  const Model model = load_model(KVLAPSE_TEST_DATA "/tiny_qwen3");
  Witness expected, seen;
  const Settings settings{"full", "100%"};
  run(*make_cpu_backend(2), model, settings, expected);
  AheadBackend backend(make_cpu_backend(2),
                       std::make_unique<ScriptedDevice>(expected, 2, model.spec.n_layers, 0, 4));
  EXPECT_THROW(run(backend, model, settings, seen, 0.7f), Error);
}

}  // namespace
}  // namespace kvlapse
