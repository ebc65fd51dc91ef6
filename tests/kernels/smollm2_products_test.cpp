// Both ways of multiplying with quantised weights against the reference in fp32 (tests/data/smollm2): the
// reference's tokens are fed, so that a difference does not grow by itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/engine/decode_session.h"
#include "core/policy/registry.h"
#include "core/policy/spec.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/smollm2.h"

namespace kvlapse {
namespace {

template <typename T>
std::vector<T> read(const TensorFile& file, const char* name) {
  const TensorView& t = file.get(name);
  std::vector<T> values(t.elements());
  std::memcpy(values.data(), t.data, t.bytes);
  return values;
}

struct Differences {
  double logit = 0;      // largest, over the 64 best logits of nine steps and all logits of the first
  double logsumexp = 0;  // largest, over all steps
  int argmax = 0;        // steps whose best token is another one
  int steps = 0;
};

void compare(const Model& model, MatmulMode mode, const char* name, Differences& d) {
  std::unique_ptr<TensorFile> golden =
      open_safetensors(std::string(KVLAPSE_TEST_DATA "/smollm2/") + name + ".safetensors");
  const auto prompt = read<int32_t>(*golden, "prompt_ids"), gen = read<int32_t>(*golden, "gen_ids");
  const auto steps = read<int32_t>(*golden, "logits.step"), ids = read<int32_t>(*golden, "logits.top_ids");
  const auto top = read<float>(*golden, "logits.top"), first = read<float>(*golden, "logits.full_step0");
  const auto lse = read<float>(*golden, "gen_lse");
  std::unique_ptr<Backend> backend = make_cpu_backend(0, mode);
  std::unique_ptr<Policy> policy = make_policy("full");
  SessionOptions options;
  options.policy = policy.get();
  options.max_tokens = static_cast<int>(gen.size());
  options.ignore_eos = true;
  DecodeSession session(*backend, model, options);
  session.add_sequence({prompt, 0, gen, 0});
  const size_t n_top = top.size() / steps.size();
  for (int s = 0; s < static_cast<int>(gen.size()); ++s) {
    session.step();
    const std::span<const float> logits = session.logits(0);
    d.argmax += std::max_element(logits.begin(), logits.end()) - logits.begin() != gen[s];
    ++d.steps;
    const double most = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (float l : logits) sum += std::exp(l - most);
    d.logsumexp = std::max(d.logsumexp, std::abs(most + std::log(sum) - lse[s]));
    const auto sampled = std::find(steps.begin(), steps.end(), s);
    for (size_t i = 0; sampled != steps.end() && i < n_top; ++i) {
      const size_t at = static_cast<size_t>(sampled - steps.begin()) * n_top + i;
      d.logit = std::max(d.logit, std::abs(static_cast<double>(logits[ids[at]]) - top[at]));
    }
    for (size_t i = 0; s == 0 && i < first.size(); ++i)
      d.logit = std::max(d.logit, std::abs(static_cast<double>(logits[i]) - first[i]));
  }
}

TEST(SmolLm2Products, ErrorsOfBothModes) {
  KVLAPSE_NEEDS_SMOLLM2();
  const Model model = load_model(kSmolLm2);
  ASSERT_TRUE(has_integer_products(model.weights.transformer));
  for (MatmulMode mode : {MatmulMode::exact, MatmulMode::int16}) {
    Differences d;
    for (const char* name : {"math", "text"}) compare(model, mode, name, d);
    const bool exact = mode == MatmulMode::exact;
    std::printf("%s: largest logit error %.1e, log-sum-exp %.1e, other tokens %d of %d\n",
                exact ? "exact" : "int16", d.logit, d.logsumexp, d.argmax, d.steps);
    EXPECT_EQ(d.argmax, 0);
    EXPECT_EQ(d.steps, 512);
    EXPECT_LT(d.logit, exact ? 2e-4 : 1e-2);
    EXPECT_LT(d.logsumexp, exact ? 2e-4 : 1e-2);
    EXPECT_GT(d.logit, 0);
  }
}

}  // namespace
}  // namespace kvlapse
