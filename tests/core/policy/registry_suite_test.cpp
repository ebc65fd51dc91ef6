// What holds for every entry of the catalogue, over random q, k, v: budget and protection kept,
// deterministic, only declared signals read, and the smallest caches survived.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <set>
#include <sstream>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/engine/tensor_memory.h"
#include "core/policy/registry.h"
#include "tests/support/core/centres_file.h"

namespace kvlapse {
namespace {

struct Tokens {
  CacheGeometry geometry;
  std::vector<float> q, k, v;

  Tokens(int n_tokens, int n_q_heads, int n_kv_heads, int head_dim, uint64_t seed)
      : geometry{2, n_q_heads, n_kv_heads, head_dim, n_tokens, DType::f32} {
    auto fill = [&](std::vector<float>& values, int heads, uint64_t which) {
      values.resize(static_cast<size_t>(n_tokens) * heads * head_dim);
      for (size_t i = 0; i < values.size(); ++i)
        values[i] = 4 * (unit_float(counter_random({seed, which, i})) - 0.5f);
    };
    fill(q, n_q_heads, 0);
    fill(k, n_kv_heads, 1);
    fill(v, n_kv_heads, 2);
  }
};

struct Outcome {
  std::vector<std::vector<int>> held;  // positions by head at the end
  std::vector<int> dropped;            // positions in the order of eviction
  int most_held = 0;                   // by one head, after a step
  int most_attended = 0;
};

Outcome run(const Policy& policy, Tokens& tokens, int n_tokens, int budget, int n_prompt, int layer = 1) {
  TensorMemory memory(tokens.geometry, tokens.q, tokens.k, tokens.v);
  CacheSite site(tokens.geometry, layer, policy, budget, n_prompt, memory, {.rope_theta = 10000});
  Outcome out;
  auto note = [&](const EvictionPlan* plan) {
    if (plan)
      for (const Drop& drop : plan->drops) out.dropped.push_back(raw(drop.pos));
    out.most_held = std::max(out.most_held, site.table().max_count());
  };
  for (int t = 0; t < n_prompt; ++t) site.append_prompt(Pos{t}, memory.rows(Pos{t}));
  note(site.finish_prompt());
  out.most_held = 0;
  for (int t = n_prompt; t < n_tokens; ++t) {
    site.append(Pos{t}, memory.rows(Pos{t}));
    memory.attend(site.table(), Pos{t});
    out.most_attended = std::max(out.most_attended, site.table().max_count());
    note(site.finish(Pos{t}));
  }
  // One more token, so that a vacated slot is taken.
  site.append(Pos{n_tokens}, memory.rows(Pos{n_tokens}));
  for (int h = 0; h < tokens.geometry.n_kv_heads; ++h) {
    out.held.emplace_back();
    for (Pos pos : site.table().positions(h)) out.held.back().push_back(raw(pos));
  }
  return out;
}

std::string spec_of(const PolicyEntry& entry) {
  const PolicyInfo info = entry.info();
  return info.reference.empty() ? std::string(info.name) : fmt::format("{}@{}", info.name, info.reference);
}

class EveryPolicy : public testing::TestWithParam<std::string> {
 protected:
  // Default rules, but often enough for a short test; calibrated for these tokens where it asks for that.
  std::unique_ptr<Policy> policy(const Tokens& tokens, const std::string& more = "") {
    if (GetParam() != "triattention") return policy(more);
    centres_.emplace(test::some_centres(tokens.geometry, 10000));
    return policy(":calibration=" + centres_->path() + more);
  }
  std::unique_ptr<Policy> policy(const std::string& more = "") const {
    std::string spec = GetParam() + more;
    if (make_policy(spec)->info().rule.cadence > 1) spec += ":cadence=16";
    return make_policy(spec);
  }
  static constexpr int kBudget = 300;  // above every default's protected set

 private:
  std::optional<test::CentresFile> centres_;
};

TEST_P(EveryPolicy, KeepsToItsBudget) {
  Tokens tokens(480, 4, 2, 16, 1);
  auto p = policy(tokens);
  Outcome out = run(*p, tokens, 470, kBudget, 20);
  if (!p->info().evicts) return;
  const EvictionRule& rule = p->info().rule;
  EXPECT_FALSE(out.dropped.empty());
  if (rule.ragged) {
    EXPECT_LE(out.held[0].size() + out.held[1].size(), static_cast<size_t>(2 * rule.peak_slots(kBudget)));
  } else {
    EXPECT_LE(out.most_held, p->layer_budget(1, 2, kBudget) + rule.cadence - 1);
    EXPECT_LE(out.most_attended, rule.peak_slots(p->layer_budget(1, 2, kBudget)));
  }
  EXPECT_LE(out.most_attended, CacheSite::capacity(*p, p->layer_budget(1, 2, kBudget), 2, 20, 480));
}

TEST_P(EveryPolicy, NeverDropsWhatIsProtected) {
  Tokens tokens(480, 4, 2, 16, 2);
  auto p = policy(tokens, ":pin_prompt=1");
  // PyramidKV's last layer has little room beside a pinned prompt.
  const int budget = p->layer_budget(1, 2, kBudget) < kBudget ? 2000 : kBudget;
  Outcome out = run(*p, tokens, 470, budget, 24);
  for (int pos : out.dropped) {
    EXPECT_GE(pos, 24);
  }
  for (const auto& held : out.held) {
    std::set<int> set(held.begin(), held.end());
    EXPECT_EQ(set.size(), held.size()) << "a token is held twice";
    for (int pos = 0; pos < 24; ++pos) {
      EXPECT_TRUE(set.count(pos));
    }
    const EvictionRule& rule = p->info().rule;
    for (int pos = 470 - rule.recent_slots(p->layer_budget(1, 2, budget)); pos <= 470; ++pos) {
      EXPECT_TRUE(set.count(pos)) << pos;
    }
  }
}

TEST_P(EveryPolicy, IsDeterministic) {
  Tokens tokens(400, 4, 2, 16, 3);
  EXPECT_EQ(run(*policy(tokens), tokens, 390, kBudget, 8).dropped,
            run(*policy(tokens), tokens, 390, kBudget, 8).dropped);
}

TEST_P(EveryPolicy, CutsALongPrompt) {
  Tokens tokens(480, 4, 2, 16, 4);
  auto p = policy(tokens, ":pin_prompt=0");
  Outcome out = run(*p, tokens, 450, kBudget, 400);
  if (!p->info().evicts) return;
  EXPECT_FALSE(out.dropped.empty());
  if (!p->info().rule.ragged) {
    EXPECT_LE(out.most_held, p->layer_budget(1, 2, kBudget) + p->info().rule.cadence - 1);
  }
}

TEST_P(EveryPolicy, OneHeadOfEachKindAndTheSmallestBudget) {
  Tokens tokens(320, 1, 1, 2, 5);
  auto p = policy(tokens);
  if (!p->info().evicts) return;
  int budget = 1;
  auto accepted = [&] {
    try {
      check_budget(*p, budget, 1);
      return true;
    } catch (const Error&) {
      return false;
    }
  };
  while (!accepted()) ASSERT_LT(++budget, 1000);
  EXPECT_FALSE(run(*p, tokens, 310, budget, 1, 1).dropped.empty());
}

TEST_P(EveryPolicy, ABudgetAboveTheSequenceDropsNothing) {
  Tokens tokens(64, 2, 1, 8, 6);
  EXPECT_TRUE(run(*policy(tokens), tokens, 60, 1000, 4).dropped.empty());
}

TEST_P(EveryPolicy, SharedAndPerHeadBothWork) {
  Tokens tokens(420, 4, 2, 16, 7);
  for (const char* granularity : {":granularity=layer", ":granularity=kv_head"})
    for (const char* gqa : {":gqa=mean", ":gqa=max", ":gqa=sum"}) {
      auto p = policy(tokens, std::string(granularity) + gqa);
      Outcome out = run(*p, tokens, 400, kBudget, 8);
      if (p->info().rule.granularity == Granularity::layer && !p->info().rule.ragged) {
        EXPECT_EQ(out.held[0], out.held[1]);
      }
    }
}

TEST_P(EveryPolicy, SaysWhereItComesFrom) {
  const PolicyInfo& info = make_policy(GetParam())->info();
  EXPECT_FALSE(info.summary.empty());
  EXPECT_FALSE(info.formula.empty());
  if (info.evicts && info.name != "random" && info.name != "window") {
    EXPECT_FALSE(info.paper.empty());
  }
  for (const ParameterInfo& p : info.parameters) {
    EXPECT_FALSE(p.summary.empty()) << p.name;
    if (p.choices.empty()) {
      EXPECT_LE(p.min, p.value) << p.name;
    }
    if (p.choices.empty()) {
      EXPECT_GE(p.max, p.value) << p.name;
    }
  }
  EXPECT_EQ(canonical_spec(*make_policy(canonical_spec(*policy()))), canonical_spec(*policy()));
  EXPECT_LE(info.score_parts.size(), 2u);
}

std::vector<std::string> all_policies() {
  std::vector<std::string> specs;
  for (const PolicyEntry& entry : policy_registry())
    if (!contains(entry.make(entry.info())->info().signals, Signal::future) && !entry.info().selects)
      specs.push_back(spec_of(entry));  // the others need a replay
  return specs;
}

INSTANTIATE_TEST_SUITE_P(Registry, EveryPolicy, testing::ValuesIn(all_policies()), [](const auto& entry) {
  std::string name = entry.param;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
  return name;
});

TEST(Registry, EntriesOfANameStandTogetherAndAreDistinct) {
  std::vector<std::string> specs, names;
  for (const PolicyEntry& entry : policy_registry()) {
    specs.push_back(spec_of(entry));
    if (names.empty() || names.back() != entry.info().name) names.emplace_back(entry.info().name);
  }
  EXPECT_EQ(std::set<std::string>(specs.begin(), specs.end()).size(), specs.size());
  EXPECT_EQ(std::set<std::string>(names.begin(), names.end()).size(), names.size());
}

TEST(Registry, BareNamesMeanWhatScriptsRelyOn) {
  for (const auto& [name, reference] :
       std::initializer_list<std::pair<const char*, const char*>>{{"h2o", "fminference"},
                                                                  {"snapkv", "zefan-cai"},
                                                                  {"longflow", "yisunlp"},
                                                                  {"rkv", "zefan-cai"},
                                                                  {"observed_attention", "kvpress"},
                                                                  {"vatp", "guozhiyu"}})
    EXPECT_EQ(make_policy(name)->info().reference, reference);
}

TEST(CheckedInputs, AnUndeclaredSignalIsRefused) {
  class Liar final : public Policy {
   public:
    using Policy::Policy;
    void score(const LayerContext&, LayerInputs& inputs, const SlotState&, Scores&) const override {
      inputs.keys(0);
    }
  };
  PolicyInfo info;
  info.name = "liar";
  Liar liar(info);
  Tokens tokens(8, 1, 1, 2, 8);
  EXPECT_THROW(run(liar, tokens, 7, 2, 0), Error);
}

}  // namespace
}  // namespace kvlapse
