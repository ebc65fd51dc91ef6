#include "core/model/gguf_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "core/base/sha256.h"
#include "tests/support/error_text.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/smollm2.h"

namespace kvlapse {
namespace {

using ::testing::AllOf;
using testing::error_text;
using testing::GgufBuilder;
using ::testing::HasSubstr;
using testing::TemporaryFile;

std::string open_error(const std::string& bytes) {
  TemporaryFile file(bytes);
  return error_text([&] { GgufFile gguf(file.path()); });
}

TEST(GgufFile, ReadsMetadataAndTensors) {
  GgufBuilder builder;
  builder.u32("a.number", 7).f32("a.float", 0.5f).boolean("a.bool", true).string("a.text", "hello");
  builder.strings("a.strings", {"x", "", "yz"}).i32s("a.integers", {-1, 2}).floats("a.floats", {1.5f});
  builder.value("a.small", 1, GgufBuilder::raw<int8_t>(-3));
  builder.tensor("w", {2, 3}, 0, std::string(24, '\0')).tensor("v", {1}, 0, GgufBuilder::raw(2.5f));
  TemporaryFile file(builder.bytes());
  GgufFile gguf(file.path());
  EXPECT_EQ(gguf.value<int64_t>("a.number"), 7);
  EXPECT_EQ(gguf.value<double>("a.float"), 0.5);
  EXPECT_EQ(gguf.value<bool>("a.bool"), true);
  EXPECT_EQ(gguf.value<std::string_view>("a.text"), "hello");
  EXPECT_EQ(gguf.value<std::vector<std::string_view>>("a.strings"),
            (std::vector<std::string_view>{"x", "", "yz"}));
  EXPECT_EQ(gguf.value<std::vector<int64_t>>("a.integers"), (std::vector<int64_t>{-1, 2}));
  EXPECT_EQ(gguf.value<int64_t>("a.small"), -3);
  EXPECT_EQ(gguf.find_value<int64_t>("absent"), nullptr);
  EXPECT_THAT(error_text([&] { gguf.value<bool>("absent"); }), HasSubstr("'absent' is missing"));
  EXPECT_THAT(error_text([&] { gguf.value<bool>("a.text"); }),
              AllOf(HasSubstr("'a.text'"), HasSubstr("a string")));
  ASSERT_EQ(gguf.tensors().size(), 2u);
  EXPECT_EQ(gguf.get("w").shape, (std::vector<int64_t>{3, 2}));
  float v = 0;
  dequantize(gguf.get("v").type, gguf.get("v").data, 1, &v);
  EXPECT_EQ(v, 2.5f);
}

TEST(GgufFile, EveryTypeGivesTheValuesOfTheReference) {
  GgufFile gguf(KVLAPSE_TEST_DATA "/tensor_types/types.gguf");
  int checked = 0;
  for (const TensorView& tensor : gguf.tensors()) {
    if (tensor.name.ends_with(".expected")) continue;
    EXPECT_EQ(tensor.name, tensor_type_name(tensor.type));
    const TensorView& expected = gguf.get(std::string(tensor.name) + ".expected");
    ASSERT_EQ(tensor.elements(), expected.elements());
    std::vector<float> values(tensor.elements());
    dequantize(tensor.type, tensor.data, tensor.elements(), values.data());
    EXPECT_EQ(std::memcmp(values.data(), expected.data, expected.bytes), 0) << tensor.name;
    ++checked;
  }
  EXPECT_EQ(checked, 11);
}

TEST(GgufFile, SmolLm2TensorsHaveTheKnownHashes) {
  KVLAPSE_NEEDS_SMOLLM2();
  GgufFile gguf(kSmolLm2);
  auto expected = nlohmann::json::parse(std::ifstream(KVLAPSE_TEST_DATA "/smollm2/tensors.json"));
  ASSERT_EQ(gguf.tensors().size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    const TensorView& tensor = gguf.tensors()[i];
    const auto& e = expected[i];
    ASSERT_EQ(tensor.name, e["name"].get<std::string>());
    EXPECT_EQ(tensor_type_name(tensor.type), e["type"].get<std::string>());
    EXPECT_EQ(std::vector<int64_t>(tensor.shape.rbegin(), tensor.shape.rend()),
              e["ne"].get<std::vector<int64_t>>());
    EXPECT_EQ(tensor.file_offset, e["file_offset"].get<uint64_t>());
    ASSERT_EQ(tensor.bytes, e["nbytes"].get<size_t>());
    EXPECT_EQ(sha256_hex({tensor.data, tensor.bytes}), e["sha256_raw"].get<std::string>()) << tensor.name;
    std::vector<float> values(tensor.elements());
    dequantize(tensor.type, tensor.data, tensor.elements(), values.data());
    EXPECT_EQ(sha256_hex(std::as_bytes(std::span(values))), e["sha256_fp32"].get<std::string>())
        << tensor.name;
  }
}

TEST(GgufFile, RefusesWhatIsNotGguf) {
  EXPECT_THAT(open_error(""), HasSubstr("magic"));
  EXPECT_THAT(open_error("GGML1234"), HasSubstr("expected 'GGUF'"));
  GgufBuilder old;
  old.version = 1;
  EXPECT_THAT(open_error(old.bytes()), HasSubstr("version: expected GGUF 2 or 3, little-endian, found 1"));
  GgufBuilder swapped;
  swapped.version = 0x03000000;
  EXPECT_THAT(open_error(swapped.bytes()), HasSubstr("big-endian"));
}

TEST(GgufFile, RefusesATruncatedFileAtEveryLength) {
  GgufBuilder builder;
  builder.u32("a", 1).strings("b", {"x", "y"}).tensor("w", {4}, 0, std::string(16, '\0'));
  std::string bytes = builder.bytes();
  bytes.resize(bytes.size() - 16);  // the padding behind the last tensor is not part of it
  {
    TemporaryFile whole(bytes);
    EXPECT_NO_THROW(GgufFile{whole.path()});
  }
  for (size_t length = 0; length < bytes.size(); ++length) open_error(bytes.substr(0, length));
}

TEST(GgufFile, RefusesHostileCounts) {
  std::string head = "GGUF" + GgufBuilder::raw<uint32_t>(3);
  EXPECT_THAT(open_error(head + GgufBuilder::raw<uint64_t>(1ull << 60) + GgufBuilder::raw<uint64_t>(0)),
              HasSubstr("tensor count"));
  EXPECT_THAT(open_error(head + GgufBuilder::raw<uint64_t>(0) + GgufBuilder::raw<uint64_t>(1ull << 60)),
              HasSubstr("metadata count"));
  std::string huge_array = GgufBuilder::raw<uint32_t>(8) + GgufBuilder::raw<uint64_t>(1ull << 61);
  EXPECT_THAT(open_error(GgufBuilder().value("k", 9, huge_array).bytes()),
              AllOf(HasSubstr("k:"), HasSubstr("elements")));
  EXPECT_THAT(open_error(GgufBuilder().value("k", 8, GgufBuilder::raw(~0ull)).bytes()),
              HasSubstr("before the end"));
  EXPECT_THAT(open_error(GgufBuilder().value("k", 99, "").bytes()), HasSubstr("found 99"));
  EXPECT_THAT(open_error(GgufBuilder().value("k", 7, "\x02").bytes()), HasSubstr("0 or 1, found 2"));
  EXPECT_THAT(open_error(GgufBuilder().u32("k", 1).u32("k", 2).bytes()), HasSubstr("found twice"));
}

TEST(GgufFile, RefusesBadTensors) {
  std::string four(16, '\0');
  EXPECT_THAT(open_error(GgufBuilder().tensor_at("w", {4}, 0, 1ull << 40, four).bytes()),
              AllOf(HasSubstr("tensor 'w'"), HasSubstr("expected 16 bytes at offset 1099511627776")));
  EXPECT_THAT(open_error(GgufBuilder().tensor_at("w", {4}, 0, ~31ull, four).bytes()),
              HasSubstr("tensor 'w'"));
  EXPECT_THAT(open_error(GgufBuilder().tensor_at("w", {4}, 0, 4, four).bytes()),
              HasSubstr("multiple of 32, found 4"));
  EXPECT_THAT(open_error(GgufBuilder().tensor("w", {4}, 10, four).bytes()),
              AllOf(HasSubstr("type: expected F32"), HasSubstr("found Q2_K")));
  EXPECT_THAT(open_error(GgufBuilder().tensor("w", {4}, 77, four).bytes()), HasSubstr("unknown type 77"));
  EXPECT_THAT(open_error(GgufBuilder().tensor("w", {33}, 8, four).bytes()),
              HasSubstr("multiple of 32 for Q8_0"));
  EXPECT_THAT(open_error(GgufBuilder().tensor("w", {0}, 0, four).bytes()), HasSubstr("found 0"));
  EXPECT_THAT(open_error(GgufBuilder().tensor("w", {1, 1, 1, 1, 1}, 0, four).bytes()), HasSubstr("found 5"));
  uint64_t most = 0x7fffffff;
  EXPECT_THAT(open_error(GgufBuilder().tensor("w", {most, most, most, most}, 0, four).bytes()),
              HasSubstr("2^63"));
  EXPECT_THAT(open_error(GgufBuilder().tensor("w", {4}, 0, four).tensor("w", {4}, 0, four).bytes()),
              HasSubstr("found twice"));
  EXPECT_THAT(open_error(GgufBuilder().u32("general.alignment", 24).bytes()), HasSubstr("power of two"));
}

}  // namespace
}  // namespace kvlapse
