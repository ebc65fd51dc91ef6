// Configurations of published models: their geometry and the bytes of their caches, and the kinds that are
// refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "core/model/model.h"
#include "tests/support/error_text.h"

namespace kvlapse {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

ModelSpec spec_of(const std::string& name) {
  return open_model_files(fs::path(KVLAPSE_TEST_DATA "/model_configs") / name).spec;
}

TEST(KnownModels, Qwen3_8B) {
  ModelSpec spec = spec_of("qwen3_8b");
  EXPECT_EQ(spec.cache_geometry(1, DType::f16).token_bytes(), 144u * 1024);
  EXPECT_TRUE(spec.qk_norm);
  EXPECT_EQ(spec.layer.head_dim, 128);
}

TEST(KnownModels, Llama31_8B) {
  ModelSpec spec = spec_of("llama_3_1_8b");
  EXPECT_EQ(spec.cache_geometry(1, DType::f16).cache_bytes(30000), 3'932'160'000u);
  EXPECT_EQ(spec.layer.head_dim, 128) << "from width and heads";
  EXPECT_EQ(spec.rope.scaling, RopeSpec::Scaling::llama3);
  EXPECT_EQ(spec.rope.original_context, 8192);
  EXPECT_THAT(spec.eos_ids, ElementsAre(128001, 128008, 128009));
}

TEST(KnownModels, R1DistillQwen7B) {
  ModelSpec spec = spec_of("r1_distill_qwen_7b");
  EXPECT_EQ(spec.cache_geometry(1, DType::f16).token_bytes(), 28u * 4 * 128 * 2 * 2);
  EXPECT_TRUE(spec.qkv_bias);
}

class RefusedModels : public ::testing::Test {
 protected:
  std::string refusal(const json& config) {
    fs::path folder = fs::temp_directory_path() / ("kvlapse_refused_" + std::to_string(::getpid()));
    fs::create_directories(folder);
    std::ofstream(folder / "config.json") << config;
    std::string text = testing::error_text([&] { open_model_files(folder); });
    fs::remove_all(folder);
    return text;
  }
  json llama() {
    return json::parse(std::ifstream(KVLAPSE_TEST_DATA "/model_configs/llama_3_1_8b/config.json"));
  }
};

TEST_F(RefusedModels, OtherArchitecturesByName) {
  for (const char* name : {"DeepseekV3ForCausalLM", "Qwen3_5ForCausalLM", "GptOssForCausalLM",
                           "Gemma3ForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM"}) {
    json config = llama();
    config["architectures"] = {name};
    EXPECT_THAT(refusal(config), AllOf(HasSubstr("architectures"), HasSubstr(name)));
  }
}

TEST_F(RefusedModels, OtherLayersByFieldAndValue) {
  auto with = [&](const char* field, json value) {
    json config = llama();
    config[field] = std::move(value);
    return refusal(config);
  };
  EXPECT_THAT(with("layer_types", {"full_attention", "linear_attention"}),
              AllOf(HasSubstr("layer_types"), HasSubstr("linear_attention")));
  EXPECT_THAT(with("layer_types", {"sliding_attention"}), HasSubstr("sliding_attention"));
  EXPECT_THAT(with("use_sliding_window", true), HasSubstr("use_sliding_window"));
  EXPECT_THAT(with("kv_lora_rank", 512), AllOf(HasSubstr("kv_lora_rank"), HasSubstr("512")));
  for (const char* experts : {"num_experts", "num_local_experts", "n_routed_experts"})
    EXPECT_THAT(with(experts, 128), AllOf(HasSubstr(experts), HasSubstr("128")));
  EXPECT_THAT(with("attention_bias", true), HasSubstr("attention_bias"));
  EXPECT_THAT(with("hidden_act", "gelu"), AllOf(HasSubstr("hidden_act"), HasSubstr("gelu")));
  EXPECT_THAT(with("quantization_config", {{"quant_method", "gptq"}}), HasSubstr("quantization_config"));
  EXPECT_THAT(with("partial_rotary_factor", 0.25), HasSubstr("partial_rotary_factor"));
  EXPECT_THAT(with("rope_scaling", {{"rope_type", "longrope"}, {"factor", 4.0}}), HasSubstr("longrope"));
  EXPECT_THAT(with("num_key_value_heads", 5), HasSubstr("num_key_value_heads"));
  EXPECT_THAT(with("vocab_size", -1), AllOf(HasSubstr("vocab_size"), HasSubstr("-1")));
  EXPECT_THAT(with("hidden_size", "wide"), HasSubstr("hidden_size"));
}

}  // namespace
}  // namespace kvlapse
