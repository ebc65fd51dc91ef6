#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/base/error.h"
#include "core/model/tensor_file.h"

namespace kvlapse {
namespace {

using testing::HasSubstr;

class Safetensors : public testing::Test {
 protected:
  void SetUp() override {
    path_ = std::filesystem::temp_directory_path() /
            fmt::format("kvlapse_{}_{}.safetensors", getpid(),
                        testing::UnitTest::GetInstance()->current_test_info()->name());
  }
  void TearDown() override { std::filesystem::remove(path_); }

  void write(std::string_view header, size_t data_bytes, std::optional<uint64_t> length = {}) {
    std::ofstream out(path_, std::ios::binary);
    uint64_t n = length.value_or(header.size());
    out.write(reinterpret_cast<const char*>(&n), 8);
    out << header;
    for (size_t i = 0; i < data_bytes; ++i) out.put(static_cast<char>(i));
  }

  std::string error() {
    try {
      open_safetensors(path_);
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr(path_.string()));
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
      return e.what();
    }
    return "no error";
  }

  std::string error_of(std::string_view header, size_t data_bytes) {
    write(header, data_bytes);
    return error();
  }

  std::filesystem::path path_;
};

TEST_F(Safetensors, ReadsWhatTheHeaderSays) {
  write(
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},)"
      R"("a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"e":{"dtype":"I64","shape":[0],"data_offsets":[16,16]}}  )",
      16);
  std::unique_ptr<TensorFile> file = open_safetensors(path_);
  ASSERT_EQ(file->tensors().size(), 3u);
  EXPECT_EQ(file->metadata()[0].second, "pt");
  const TensorView& b = file->get("b");
  EXPECT_EQ(b.type, TensorType::bf16);
  EXPECT_EQ(b.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(b.bytes, 12u);
  EXPECT_EQ(std::to_integer<int>(b.data[0]), 4);
  EXPECT_EQ(file->get("a").elements(), 1);
  EXPECT_EQ(file->find("c"), nullptr);
  EXPECT_THROW(file->get("c"), Error);
}

TEST_F(Safetensors, RefusesHostileHeaders) {
  EXPECT_THAT(error(), HasSubstr("No such file"));
  std::ofstream(path_) << "abc";
  EXPECT_THAT(error(), HasSubstr("at least 8 bytes, found 3"));
  write("{}", 0, 3);
  EXPECT_THAT(error(), HasSubstr("header length: expected at most 2 bytes, found 3"));
  write("{}", 0, ~0ull);
  EXPECT_THAT(error(), HasSubstr("header length"));

  EXPECT_THAT(error_of("", 0), HasSubstr("expected a JSON object"));
  EXPECT_THAT(error_of("[1]", 0), HasSubstr("expected a JSON object, found array"));
  EXPECT_THAT(error_of("{\"a\":", 0), HasSubstr("expected a JSON object"));
  EXPECT_THAT(error_of(std::string(5000, '['), 0), HasSubstr("header"));
  EXPECT_THAT(error_of(R"({"a":{"b":[[1]]}})", 0), HasSubstr("levels"));
  EXPECT_THAT(error_of(R"({"a":3})", 0), HasSubstr("tensor 'a': expected an object, found number"));
  EXPECT_THAT(error_of(R"({"__metadata__":{"x":1}})", 0), HasSubstr("expected a string, found number"));
  EXPECT_THAT(error_of(R"({"a":{"dtype":"F32","shape":[1]}})", 4), HasSubstr("'data_offsets' is missing"));
  EXPECT_THAT(error_of(R"({"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}})", 8),
              HasSubstr("found 'F64'"));
  EXPECT_THAT(error_of(R"({"a":{"dtype":7,"shape":[1],"data_offsets":[0,4]}})", 4),
              HasSubstr("expected a string"));
  EXPECT_THAT(error_of(R"({"a\n":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4),
              HasSubstr("tensor 'a': data_offsets: expected 8 bytes for F32 [2], found 4"));
}

TEST_F(Safetensors, RefusesNumbersThatDoNotFit) {
  for (const char* shape : {"[-1]", "[1.5]", "[1e3]", "[\"1\"]", "[true]", "[18446744073709551616]"})
    EXPECT_THAT(
        error_of(fmt::format(R"({{"a":{{"dtype":"F32","shape":{},"data_offsets":[0,4]}}}})", shape), 4),
        HasSubstr("expected a whole number"));
  // Products that wrap around 2^64 to exactly 4 bytes.
  EXPECT_THAT(error_of(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0),
              HasSubstr("fits the file"));
  EXPECT_THAT(error_of(R"({"a":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}})", 0),
              HasSubstr("fits the file"));
  EXPECT_THAT(error_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4),
              HasSubstr("found [4, 0)"));
  EXPECT_THAT(error_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 4),
              HasSubstr("within 4 bytes"));
  EXPECT_THAT(error_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}})", 4),
              HasSubstr("within 4 bytes"));
}

TEST_F(Safetensors, TensorsTileTheData) {
  auto two = [](const char* a, const char* b) {
    return fmt::format(
        R"({{"a":{{"dtype":"F32","shape":[1],"data_offsets":{}}},"b":{{"dtype":"F32","shape":[1],"data_offsets":{}}}}})",
        a, b);
  };
  EXPECT_EQ(error_of(two("[4,8]", "[0,4]"), 8), "no error");
  EXPECT_THAT(error_of(two("[0,4]", "[0,4]"), 4), HasSubstr("expected to begin at 4"));
  EXPECT_THAT(error_of(two("[0,4]", "[2,6]"), 6),
              HasSubstr("expected to begin at 4 where the one before ends, found 2"));
  EXPECT_THAT(error_of(two("[0,4]", "[8,12]"), 12),
              HasSubstr("expected to begin at 4 where the one before ends, found 8"));
  EXPECT_THAT(error_of(two("[0,4]", "[4,8]"), 9), HasSubstr("data: expected 8 bytes, found 9"));
  EXPECT_THAT(error_of(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                       R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                       2),
              HasSubstr("tensor 'a': expected once, found twice"));
}

}  // namespace
}  // namespace kvlapse
