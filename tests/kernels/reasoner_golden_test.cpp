// The built-in model over 2000 greedy tokens of 20 prompts against transformers in fp32 (tests/data/
// make_reasoner_golden.py), as one batch.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "core/engine/decode_session.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvlapse {
namespace {

template <typename T>
std::vector<T> read(const TensorFile& file, const char* name) {
  const TensorView& t = file.get(name);
  std::vector<T> values(t.elements());
  std::memcpy(values.data(), t.data, t.bytes);
  return values;
}

TEST(ReasonerGolden, TwentyPromptsTokenForToken) {
  std::unique_ptr<TensorFile> golden = open_safetensors(KVLAPSE_TEST_DATA "/reasoner_golden.safetensors");
  const auto prompts = read<int32_t>(*golden, "prompt_ids"), offsets = read<int32_t>(*golden, "prompt_off");
  const auto expected = read<int32_t>(*golden, "gen_ids"), steps = read<int32_t>(*golden, "logit_step");
  const auto top_ids = read<int32_t>(*golden, "logit_top_ids");
  const auto top = read<float>(*golden, "logit_top"), full_logits = read<float>(*golden, "full_logits");
  const auto full_prompt = read<int32_t>(*golden, "full_prompt"),
             full_step = read<int32_t>(*golden, "full_step");
  const int n_prompts = static_cast<int>(golden->get("gen_ids").shape[0]);
  const int n_tokens = static_cast<int>(golden->get("gen_ids").shape[1]);
  const int n_sampled = static_cast<int>(golden->get("logit_step").shape[1]);
  const int n_top = static_cast<int>(golden->get("logit_top").shape[2]);
  const int n_full = static_cast<int>(golden->get("full_step").shape[1]);

  const Model model = load_model(KVLAPSE_MODELS "/reasoner-6m");
  std::unique_ptr<Policy> policy = make_policy("full");
  std::unique_ptr<Backend> backend = make_cpu_backend();
  SessionOptions options;
  options.policy = policy.get();
  options.max_tokens = n_tokens;
  options.ignore_eos = true;
  DecodeSession session(*backend, model, options);
  for (int i = 0; i < n_prompts; ++i)
    session.add_sequence({{prompts.begin() + offsets[i], prompts.begin() + offsets[i + 1]}, 0, {}, 0});

  double worst = 0;
  int compared = 0;
  for (int step = 0; step < n_tokens; ++step) {
    session.step();
    for (int i = 0; i < n_prompts; ++i) {
      ASSERT_EQ(session.sequence(i).generated(), step + 1);
      ASSERT_EQ(session.sequence(i).tokens.back(), expected[i * n_tokens + step])
          << "prompt " << i << " token " << step;
      const std::span<const float> logits = session.logits(i);
      auto compare = [&](int id, float reference) {
        worst = std::max(worst, std::abs(static_cast<double>(logits[id]) - reference));
        ++compared;
      };
      for (int s = 0; s < n_sampled; ++s)
        if (steps[i * n_sampled + s] == step)
          for (int k = 0; k < n_top; ++k) {
            const int at = (i * n_sampled + s) * n_top + k;
            compare(top_ids[at], top[at]);
          }
      for (size_t f = 0; f < full_prompt.size(); ++f)
        for (int s = 0; s < n_full; ++s)
          if (full_prompt[f] == i && full_step[f * n_full + s] == step)
            for (size_t id = 0; id < logits.size(); ++id)
              compare(static_cast<int>(id), full_logits[(f * n_full + s) * logits.size() + id]);
    }
  }
  EXPECT_EQ(compared, n_prompts * n_sampled * n_top + static_cast<int>(full_logits.size()));
  EXPECT_LT(worst, 5e-4);
  RecordProperty("max_logit_error", std::to_string(worst));
}

}  // namespace
}  // namespace kvlapse
