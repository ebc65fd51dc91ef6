// Tiny random checkpoints of every architecture, RoPE scaling and storage type against transformers:
// tests/data/tiny_models/make.py.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>

#include "core/engine/decode_session.h"
#include "core/model/model.h"
#include "core/policy/registry.h"
#include "core/policy/spec.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvlapse {
namespace {

namespace fs = std::filesystem;

const fs::path kFolder = KVLAPSE_TEST_DATA "/tiny_models";

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const auto& entry : fs::directory_iterator(kFolder))
    if (entry.is_directory() || entry.path().extension() == ".gguf")
      all.push_back(entry.path().stem().string());
  std::sort(all.begin(), all.end());
  return all;
}

template <typename T>
std::vector<T> values(const TensorView& tensor) {
  std::vector<T> out(tensor.elements());
  std::memcpy(out.data(), tensor.data, tensor.bytes);
  return out;
}

class TinyModels : public ::testing::TestWithParam<std::string> {};

TEST_P(TinyModels, LogitsOfTransformers) {
  fs::path path = kFolder / GetParam();
  if (!fs::is_directory(path)) path += ".gguf";
  Model model = load_model(path);
  auto golden = open_safetensors(kFolder / "golden.safetensors");
  auto ids = values<int32_t>(golden->get(GetParam() + ".ids"));
  auto expected = values<float>(golden->get(GetParam() + ".logits"));
  const size_t n_vocab = model.spec.n_vocab, n_shown = expected.size() / n_vocab;
  ASSERT_EQ(n_shown, 8u);

  auto backend = make_cpu_backend(1);
  auto policy = make_policy("full");
  SessionOptions options;
  options.policy = policy.get();
  options.ignore_eos = true;
  DecodeSession session(*backend, model, options);
  // The last seven tokens are decoded one by one, so prefill and decode are both compared.
  SequenceRequest request;
  request.prompt.assign(ids.begin(), ids.end() - (n_shown - 1));
  request.teacher.assign(ids.end() - (n_shown - 1), ids.end());
  request.teacher.push_back(0);
  session.add_sequence(request);
  float largest = 0, magnitude = 0;
  for (size_t step = 0; step < n_shown; ++step) {
    session.step();
    auto found = session.logits(0);
    for (size_t i = 0; i < n_vocab; ++i) {
      float e = expected[step * n_vocab + i];
      ASSERT_TRUE(std::isfinite(found[i]));
      largest = std::max(largest, std::abs(found[i] - e));
      magnitude = std::max(magnitude, std::abs(e));
    }
  }
  EXPECT_GT(magnitude, 0.5f);
  EXPECT_LT(largest / magnitude, 2e-5f) << "largest difference " << largest << " of " << magnitude;
}

INSTANTIATE_TEST_SUITE_P(All, TinyModels, ::testing::ValuesIn(names()),
                         [](const auto& i) { return i.param; });

}  // namespace
}  // namespace kvlapse
