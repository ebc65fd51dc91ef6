// Folders that must be refused, each by one change to a good one.
#include "core/model/model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/model/model_config.h"

namespace kvlapse {
namespace {

using nlohmann::json;
using testing::HasSubstr;
namespace fs = std::filesystem;

class ModelFolder : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() /
        fmt::format("kvlapse_{}_{}", getpid(), testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(folder_);
    fs::copy(KVLAPSE_TEST_DATA "/tiny_qwen3", folder_);
    std::ifstream(folder_ / "config.json") >> config_;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string error() {
    try {
      load_model(folder_);
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr(folder_.string()));
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
      return e.what();
    }
    return "no error";
  }

  std::string error_with(const char* field, const json& value) {
    json changed = config_;
    changed[field] = value;
    std::ofstream(folder_ / "config.json") << changed;
    std::string message = error();
    std::ofstream(folder_ / "config.json") << config_;
    return message;
  }

  // Overwrites bytes of a tensor.
  template <typename T>
  void poke(const char* tensor, int64_t element, T value) {
    const uint64_t offset = open_safetensors(folder_ / "model.safetensors")->get(tensor).file_offset;
    std::fstream file(folder_ / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(offset + element * sizeof(T)));
    file.write(reinterpret_cast<const char*>(&value), sizeof(T));
  }

  fs::path folder_;
  json config_;
};

TEST_F(ModelFolder, ReadsTheDescription) {
  const Model model = load_model(folder_);
  EXPECT_EQ(model.spec.architecture, Architecture::qwen3);
  EXPECT_TRUE(model.spec.qk_norm);
  EXPECT_FALSE(model.spec.tied_embeddings);
  EXPECT_EQ(model.spec.layer.n_q_heads, 4);
  EXPECT_EQ(model.spec.layer.n_kv_heads, 2);
  EXPECT_EQ(model.spec.rope.theta, 10000);
  EXPECT_EQ(model.weights.transformer.layers.size(), 2u);
  EXPECT_EQ(model.weights.hash.size(), 32u);
  EXPECT_EQ(model.weights.hash, load_model(folder_).weights.hash);
}

TEST_F(ModelFolder, RefusesWhatTheEngineDoesNotCompute) {
  EXPECT_THAT(error_with("architectures", {"MixtralForCausalLM"}),
              HasSubstr("architectures: expected Qwen3ForCausalLM"));
  EXPECT_THAT(error_with("hidden_act", "gelu"), HasSubstr("hidden_act: expected \"silu\", found \"gelu\""));
  EXPECT_THAT(error_with("use_sliding_window", true), HasSubstr("use_sliding_window"));
  EXPECT_THAT(error_with("layer_types", {"full_attention", "sliding_attention"}),
              HasSubstr("\"sliding_attention\""));
  EXPECT_THAT(error_with("quantization_config", {{"bits", 4}}),
              HasSubstr("quantization_config: expected none"));
  EXPECT_THAT(error_with("attention_bias", true), HasSubstr("attention_bias"));
  EXPECT_THAT(error_with("rope_parameters", {{"rope_type", "dynamic"}, {"factor", 2.0}}),
              HasSubstr("found 'dynamic'"));
}

TEST_F(ModelFolder, RefusesNumbersThatMakeNoModel) {
  EXPECT_THAT(error_with("num_key_value_heads", 3),
              HasSubstr("expected a divisor of num_attention_heads 4, found 3"));
  EXPECT_THAT(error_with("num_hidden_layers", -1), HasSubstr("num_hidden_layers: expected a whole number"));
  EXPECT_THAT(error_with("hidden_size", 1e30), HasSubstr("hidden_size: expected a whole number"));
  EXPECT_THAT(error_with("vocab_size", nullptr),
              HasSubstr("vocab_size: expected a whole number, found nothing"));
  EXPECT_THAT(error_with("head_dim", 15), HasSubstr("head_dim: expected an even number"));
  EXPECT_THAT(error_with("eos_token_id", 64), HasSubstr("eos_token_id: expected ids in [0, 64), found 64"));
  EXPECT_THAT(error_with("rope_parameters", 3), HasSubstr("rope_parameters: expected an object"));
}

TEST_F(ModelFolder, RefusesTensorsThatDoNotFit) {
  EXPECT_THAT(error_with("num_hidden_layers", 3),
              HasSubstr("tensor 'model.layers.2.input_layernorm.weight' is missing (expected shape [32])"));
  EXPECT_THAT(
      error_with("intermediate_size", 64),
      HasSubstr("tensor 'model.layers.0.mlp.gate_proj.weight': expected shape [64, 32], found [48, 32]"));
  poke<uint32_t>("model.layers.1.mlp.down_proj.weight", 77, 0x7fc00000u);
  EXPECT_THAT(
      error(),
      HasSubstr("tensor 'model.layers.1.mlp.down_proj.weight': expected numbers, found NaN at element 77"));
}

TEST_F(ModelFolder, RefusesMissingAndBrokenFiles) {
  std::ofstream(folder_ / "config.json") << "{\"a\": ";
  EXPECT_THAT(error(), HasSubstr("config.json: expected a JSON object"));
  fs::remove(folder_ / "config.json");
  EXPECT_THAT(error(), HasSubstr("expected config.json or a GGUF file in the folder, found neither"));
  std::ofstream(folder_ / "config.json") << config_;
  fs::remove(folder_ / "model.safetensors");
  EXPECT_THAT(error(), HasSubstr("model.safetensors"));
  fs::remove_all(folder_);
  EXPECT_THAT(error(), HasSubstr("expected a GGUF file or a folder with config.json, found nothing"));
}

TEST(Rope, ScalingsFollowTheirDefinitions) {
  RopeSpec spec;
  spec.theta = 10000;
  const RopeTable plain = rope_table(spec, 64);
  EXPECT_EQ(plain.inverse_frequencies[0], 1.0f);
  EXPECT_NEAR(plain.inverse_frequencies[16], 0.01f, 1e-7f);

  spec.scaling = RopeSpec::Scaling::linear;
  spec.factor = 4;
  EXPECT_EQ(rope_table(spec, 64).inverse_frequencies[0], 0.25f);

  spec.scaling = RopeSpec::Scaling::llama3;
  spec.factor = 8;
  spec.original_context = 8192;
  const RopeTable llama = rope_table(spec, 64);
  EXPECT_EQ(llama.inverse_frequencies[0], plain.inverse_frequencies[0]);           // short waves stay
  EXPECT_EQ(llama.inverse_frequencies[31], plain.inverse_frequencies[31] / 8.0f);  // long ones stretch

  spec.scaling = RopeSpec::Scaling::yarn;
  const RopeTable yarn = rope_table(spec, 64);
  EXPECT_EQ(yarn.inverse_frequencies[0], plain.inverse_frequencies[0]);
  EXPECT_FLOAT_EQ(yarn.inverse_frequencies[31], plain.inverse_frequencies[31] / 8.0f);
  EXPECT_FLOAT_EQ(yarn.attention_factor, static_cast<float>(0.1 * std::log(8.0) + 1));
}

}  // namespace
}  // namespace kvlapse
