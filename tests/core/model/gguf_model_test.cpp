// GGUF models that must be refused, each by one change to a good one, and prompts.
#include "core/model/gguf_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/model/model.h"
#include "core/model/prompt.h"
#include "tests/support/error_text.h"
#include "tests/support/gguf_builder.h"

namespace kvlapse {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using testing::error_text;
using testing::GgufBuilder;
using ::testing::HasSubstr;
using testing::TemporaryFile;

constexpr uint32_t kF32 = 0;

// Width 4, one layer, two heads of 2, three tokens. `skip` leaves a key or a tensor out.
struct Tiny {
  std::string skip = {};
  std::string architecture = "llama";
  std::vector<std::string> tokens{"a", "b", "ab"};
  std::vector<uint64_t> q_shape{4, 4};
  std::string merge = "a b";
  GgufBuilder extra = {};

  GgufBuilder build() const {
    GgufBuilder b = extra;
    const std::string& a = architecture;
    auto u32 = [&](const std::string& key, uint32_t v) {
      if (key != skip) b.u32(a + "." + key, v);
    };
    b.string("general.architecture", a);
    u32("block_count", 1), u32("context_length", 16), u32("embedding_length", 4),
        u32("feed_forward_length", 4);
    u32("attention.head_count", 2), u32("attention.head_count_kv", 2);
    b.f32(a + ".attention.layer_norm_rms_epsilon", 1e-5f);
    b.string("tokenizer.ggml.model", "gpt2").string("tokenizer.ggml.pre", "gpt-2");
    b.strings("tokenizer.ggml.tokens", tokens).strings("tokenizer.ggml.merges", {merge});
    auto tensor = [&](const std::string& name, const std::vector<uint64_t>& ne) {
      uint64_t n = 4;
      for (uint64_t extent : ne) n *= extent;
      if (name != skip) b.tensor(name, ne, kF32, std::string(n, '\0'));
    };
    tensor("token_embd.weight", {4, 3});
    tensor("output_norm.weight", {4});
    tensor("blk.0.attn_norm.weight", {4}), tensor("blk.0.ffn_norm.weight", {4});
    tensor("blk.0.attn_q.weight", q_shape);
    for (const char* name : {"attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"})
      tensor(std::string("blk.0.") + name + ".weight", {4, 4});
    return b;
  }
  std::string refusal() const {
    TemporaryFile file(build().bytes());
    std::string text = error_text([&] { load_model(file.path()); });
    EXPECT_THAT(text, HasSubstr(file.path().string()));
    return text;
  }
};

TEST(GgufModel, ATinyOneLoads) {
  TemporaryFile file(Tiny().build().bytes());
  Model model = load_model(file.path());
  EXPECT_EQ(model.spec.layer.head_dim, 2);
  EXPECT_TRUE(model.spec.tied_embeddings);
  EXPECT_EQ(model.spec.n_vocab, 3);
  EXPECT_EQ(model.weights.transformer.layers.size(), 1u);
}

TEST(GgufModel, RefusesWhatIsMissing) {
  EXPECT_THAT(Tiny{.skip = "blk.0.ffn_up.weight"}.refusal(),
              AllOf(HasSubstr("blk.0.ffn_up.weight"), HasSubstr("missing")));
  EXPECT_THAT(Tiny{.skip = "token_embd.weight"}.refusal(), HasSubstr("token_embd.weight"));
  EXPECT_THAT(Tiny{.skip = "block_count"}.refusal(), HasSubstr("llama.block_count"));
}

TEST(GgufModel, RefusesWhatDisagrees) {
  EXPECT_THAT((Tiny{.q_shape = {4, 8}}.refusal()),
              AllOf(HasSubstr("blk.0.attn_q.weight"), HasSubstr("expected shape [4, 4], found [8, 4]")));
  EXPECT_THAT((Tiny{.tokens = {"a", "b", "ab", "c"}}.refusal()),
              HasSubstr("expected 3 tokens, one a row of the embedding, found 4"));
  EXPECT_THAT(Tiny{.merge = "a z"}.refusal(), AllOf(HasSubstr("merges[0]"), HasSubstr("found 'z'")));
}

TEST(GgufModel, RefusesWhatItDoesNotCompute) {
  EXPECT_THAT(Tiny{.architecture = "gemma3"}.refusal(), HasSubstr("found 'gemma3'"));
  EXPECT_THAT(Tiny{.extra = GgufBuilder().u32("llama.expert_count", 8)}.refusal(),
              AllOf(HasSubstr("llama.expert_count"), HasSubstr("found 8")));
  EXPECT_THAT(Tiny{.extra = GgufBuilder().string("llama.rope.scaling.type", "longrope")}.refusal(),
              HasSubstr("found 'longrope'"));
  EXPECT_THAT(Tiny{.extra = GgufBuilder().u32("llama.rope.dimension_count", 1)}.refusal(),
              HasSubstr("partial rotation"));
  EXPECT_THAT(
      Tiny{.extra = GgufBuilder().tensor("blk.0.attn_q.bias", {4}, kF32, std::string(16, '\0'))}.refusal(),
      HasSubstr("'blk.0.attn_q.bias'"));
  EXPECT_THAT(Tiny{.extra = GgufBuilder().u32("llama.attention.key_length", 3)}.refusal(),
              HasSubstr("even number"));
}

TEST(GgufModel, Prompts) {
  TemporaryFile file(Tiny().build().bytes());
  Model model = load_model(file.path());
  EXPECT_THAT(make_prompt(model.spec, *model.tokenizer, "aab", false).ids, ElementsAre(0, 2));
  auto refusal = [&](const std::string& text, bool chat) {
    return error_text([&] { make_prompt(model.spec, *model.tokenizer, text, chat); });
  };
  EXPECT_THAT(refusal("a\xff", false), HasSubstr("found byte 0xff at offset 1"));
  EXPECT_THAT(refusal("", false), HasSubstr("at least one token"));
  EXPECT_THAT(refusal(std::string(40, 'a'), false),
              HasSubstr("expected fewer tokens than the context of 16 holds, found 40"));
  EXPECT_THAT(refusal("a", true), HasSubstr("expected one in the model's files, found none"));
}

}  // namespace
}  // namespace kvlapse
