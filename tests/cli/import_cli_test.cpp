// import: the inverse of export, bit for bit; files of other tools; every refusal by name.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <span>

#include "core/base/dtype.h"
#include "tests/support/cli/program.h"
#include "trace/crc32.h"
#include "trace/trace_reader.h"

namespace kvlapse::test {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using testing::HasSubstr;

// Just enough of a writer of safetensors, as another tool would have.
struct Array {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string data;
};
using Arrays = std::map<std::string, Array>;

template <typename T>
std::string bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

void write_safetensors(const std::string& path, const Arrays& arrays,
                       const std::map<std::string, std::string>& metadata) {
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::string data;
  for (const auto& [name, array] : arrays) {
    header[name] = {{"dtype", array.dtype},
                    {"shape", array.shape},
                    {"data_offsets", {data.size(), data.size() + array.data.size()}}};
    data += array.data;
  }
  const std::string text = header.dump();
  const uint64_t length = text.size();
  write_file(path, std::string(reinterpret_cast<const char*>(&length), 8) + text + data);
}

constexpr int kTokens = 70, kQHeads = 4, kKvHeads = 2, kDim = 8;  // more than one chunk of 64

// Values that bf16 holds, different in every place.
std::vector<float> values(int layer, char kind, int heads) {
  std::vector<float> out(static_cast<size_t>(kTokens) * heads * kDim);
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = static_cast<float>(static_cast<int>((i * 37 + layer * 11 + kind) % 255) - 127) / 64.0f;
  return out;
}

Arrays two_layers() {
  Arrays arrays;
  for (int layer : {0, 1})
    for (char kind : {'q', 'k', 'v'}) {
      const int heads = kind == 'q' ? kQHeads : kKvHeads;
      arrays[std::string(1, kind) + ".L" + std::to_string(layer)] = {
          "F32", {kTokens, heads, kDim}, bytes_of(values(layer, kind, heads))};
    }
  return arrays;
}

template <typename T>
T number_at(const std::string& bytes, size_t offset) {
  T value{};
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

class ImportCli : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = fs::temp_directory_path() / ("kvlapse_import_" + std::to_string(getpid()));
    fs::create_directories(folder_);
    for (const auto& [name, dtype, policy] :
         {std::tuple{"full32", "fp32", "full"}, {"full16", "bf16", "full"}, {"evicted", "fp16", "h2o"}})
      ASSERT_EQ(run_program({"record", "-q", "-o", path(std::string(name) + ".kvl"), "--max-tokens", "90",
                             "--ignore-eos", "--policy", policy, "--budget", "150", "--kv-dtype", dtype})
                    .exit_code,
                0);
  }
  static void TearDownTestSuite() { fs::remove_all(folder_); }
  static std::string path(const std::string& name) { return (folder_ / name).string(); }

  static Outcome import(const std::string& file, const std::string& format, const std::string& trace,
                        std::vector<std::string> more = {}) {
    std::vector<std::string> arguments{"import", path(file), "--from", format, "-o", path(trace), "-q"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_program(arguments);
  }
  // Rows of a comparison without what names the file, in an order that does not depend on it.
  static std::set<std::string> replayed(const std::string& trace) {
    const Outcome outcome = run_program({"replay", path(trace), "-q", "--json", "--force", "--policy",
                                         "longflow,rkv,streaming_llm:positions=cache,random", "--budget",
                                         "60,50%", "-o", path(trace + ".kvr")});
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    std::set<std::string> rows;
    if (outcome.exit_code != 0) return rows;
    const Json document = Json::parse(outcome.out);
    for (Json row : document["rows"]) {
      row.erase("trace");
      row.erase("cell");
      rows.insert(row.dump());
    }
    EXPECT_EQ(rows.size(), 8u);
    return rows;
  }
  static void expect_refusal(const Outcome& outcome, int code, const std::vector<std::string>& words) {
    EXPECT_EQ(outcome.exit_code, code) << outcome.err;
    for (const std::string& word : words) EXPECT_THAT(outcome.err, HasSubstr(word));
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    EXPECT_FALSE(fs::exists(path("refused.kvl")));
  }
  static inline fs::path folder_;
};

TEST_F(ImportCli, IsTheInverseOfExportBitForBit) {
  for (const std::string format : {"safetensors", "npz"})
    for (const std::string name : {"full32", "full16", "evicted"}) {
      SCOPED_TRACE(format + " " + name);
      const std::string dump = name + "." + format, back = name + "." + format + ".kvl";
      ASSERT_EQ(run_program({"export", path(name + ".kvl"), "--format", format, "-o", path(dump)}).exit_code,
                0);
      const Outcome outcome = import(dump, format, back, {"--json"});
      ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
      const Json report = Json::parse(outcome.out);
      const TraceReader a(path(name + ".kvl")), b(path(back));
      const CacheGeometry& g = a.header().geometry;
      const int n = a.n_steps(0);
      ASSERT_EQ(b.n_steps(0), n);
      EXPECT_EQ(b.header().geometry.dtype, g.dtype);
      EXPECT_EQ(b.header().rope_theta, a.header().rope_theta);
      EXPECT_EQ(b.header().meta.at("model"), a.header().meta.at("model"));
      EXPECT_EQ(b.header().meta.at("imported_format"), format);
      EXPECT_EQ(b.header().meta.at("imported_file"), dump);
      EXPECT_EQ(b.header().meta.at("imported_sha256").size(), 64u);
      const TraceSequence was = a.sequence(0), is = b.sequence(0);
      EXPECT_EQ(is.n_prompt, was.n_prompt);
      EXPECT_EQ(is.think_begin, was.think_begin);
      EXPECT_EQ(is.think_end, was.think_end);
      EXPECT_EQ(is.end_reason, "imported");
      EXPECT_TRUE(std::equal(is.tokens.begin(), is.tokens.end(), was.tokens.begin()));
      EXPECT_EQ(is.tokens.size(), static_cast<size_t>(n));
      for (int layer = 0; layer < g.n_layers; ++layer)
        for (RowKind kind : {RowKind::q, RowKind::k, RowKind::v}) {
          const int heads = kind == RowKind::q ? g.n_q_heads : g.n_kv_heads;
          std::vector<std::byte> x(static_cast<size_t>(n) * heads * g.row_bytes()), y(x.size());
          a.read_rows_raw(0, layer, kind, 0, n, x.data());
          b.read_rows_raw(0, layer, kind, 0, n, y.data());
          ASSERT_EQ(std::memcmp(x.data(), y.data(), x.size()), 0);
        }
      EXPECT_EQ(run_program({"verify", path(back)}).exit_code, 0);
      EXPECT_TRUE(replayed(back) == replayed(name + ".kvl"));
      if (name == "evicted")
        EXPECT_GT(report["evictions_not_kept"], 100);
      else
        EXPECT_EQ(b.content_hash(), a.content_hash());
    }
}

TEST_F(ImportCli, APartOfTheLayersStaysWhereItWas) {
  ASSERT_EQ(run_program({"export", path("full16.kvl"), "--format", "safetensors", "--layers", "1:3", "-o",
                         path("part.safetensors")})
                .exit_code,
            0);
  ASSERT_EQ(import("part.safetensors", "safetensors", "part.kvl").exit_code, 0);
  const TraceReader whole(path("full16.kvl")), part(path("part.kvl"));
  EXPECT_EQ(part.header().layer_begin, 1);
  EXPECT_EQ(part.header().layer_end, 3);
  EXPECT_EQ(part.header().geometry.n_layers, whole.header().geometry.n_layers);
  EXPECT_EQ(run_program({"verify", path("part.kvl")}).exit_code, 0);
}

TEST_F(ImportCli, TensorsAloneAreEnoughAndWhatIsUnknownStaysAbsent) {
  write_safetensors(path("min.safetensors"), two_layers(), {});
  const Outcome outcome = import("min.safetensors", "safetensors", "min.kvl", {"--prompt", "10"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("ids not known"));
  const TraceReader trace(path("min.kvl"));
  EXPECT_TRUE(trace.complete());
  EXPECT_EQ(trace.n_steps(0), kTokens);
  EXPECT_EQ(trace.header().rope_theta, 0);
  EXPECT_FALSE(trace.header().meta.contains("model"));
  EXPECT_TRUE(trace.steps(0, 0, kTokens).empty());
  EXPECT_EQ(trace.sequence(0).tokens, std::vector<int32_t>(kTokens, kNoToken));
  EXPECT_EQ(trace.sequence(0).text, "");
  for (int layer : {0, 1})
    for (RowKind kind : {RowKind::q, RowKind::k, RowKind::v}) {
      const int heads = kind == RowKind::q ? kQHeads : kKvHeads;
      std::vector<float> rows(static_cast<size_t>(kTokens) * heads * kDim);
      trace.read_rows(0, layer, kind, 0, kTokens, rows.data());
      EXPECT_EQ(rows, values(layer, row_kind_name(kind)[0], heads));
    }
  EXPECT_EQ(run_program({"verify", path("min.kvl")}).exit_code, 0);
  EXPECT_EQ(run_program({"info", path("min.kvl")}).exit_code, 0);
  EXPECT_EQ(run_program({"replay", "--self", path("min.kvl")}).exit_code, 0);
  EXPECT_EQ(run_program({"replay", path("min.kvl"), "-q", "--policy", "longflow,h2o", "--budget", "50%", "-o",
                         path("min.kvr")})
                .exit_code,
            0);
  // And out again: no ids where none are known.
  ASSERT_EQ(run_program({"export", path("min.kvl"), "--format", "npz", "-o", path("min.npz")}).exit_code, 0);
  ASSERT_EQ(import("min.npz", "npz", "min2.kvl").exit_code, 0);
  EXPECT_EQ(TraceReader(path("min2.kvl")).content_hash(), trace.content_hash());
}

TEST_F(ImportCli, OneFileASequenceAndADtypeThatFits) {
  const std::map<std::string, std::string> metadata{{"n_prompt", "12"}, {"format", "pt"}};
  Arrays arrays = two_layers();
  write_safetensors(path("a.safetensors"), arrays, metadata);
  std::vector<int64_t> ids(kTokens);
  for (int i = 0; i < kTokens; ++i) ids[i] = 1000 + i;
  arrays["tokens"] = {"I64", {kTokens}, bytes_of(ids)};
  write_safetensors(path("b.safetensors"), arrays, metadata);
  const Outcome outcome = run_program({"import", path("a.safetensors"), path("b.safetensors"), "--from",
                                       "safetensors", "--kv-dtype", "bf16", "-o", path("ab.kvl"), "--json"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const TraceReader trace(path("ab.kvl"));
  ASSERT_EQ(trace.n_sequences(), 2);
  EXPECT_EQ(trace.header().geometry.dtype, DType::bf16);
  EXPECT_EQ(trace.sequence(0).tokens[5], kNoToken);
  EXPECT_EQ(trace.sequence(1).tokens[69], 1069);
  std::vector<float> rows(static_cast<size_t>(kTokens) * kKvHeads * kDim);
  trace.read_rows(1, 1, RowKind::k, 0, kTokens, rows.data());
  EXPECT_EQ(rows, values(1, 'k', kKvHeads));
  EXPECT_EQ(run_program({"verify", path("ab.kvl")}).exit_code, 0);
}

TEST_F(ImportCli, RefusesByNameWhatDoesNotFit) {
  struct Case {
    std::function<void(Arrays&, std::map<std::string, std::string>&)> change;
    std::vector<std::string> words;
  };
  const auto put_value = [](Array& array, size_t index, float value) {
    std::memcpy(array.data.data() + index * sizeof value, &value, sizeof value);
  };
  const std::vector<Case> cases = {
      {[](Arrays& a, auto&) { a.erase("v.L1"); }, {"'v.L1'", "found none"}},
      {[](Arrays& a, auto&) {
         for (const char* n : {"q", "k", "v"}) {
           a[std::string(n) + ".L3"] = a[std::string(n) + ".L0"];
         }
       },
       {"'q.L2'", "layers 0 to 3"}},
      {[](Arrays& a, auto&) { a["attn.L0"] = a["q.L0"]; }, {"'attn.L0'", "expected q.L<layer>"}},
      {[](Arrays& a, auto&) { a["q.L01"] = a["q.L0"]; }, {"'q.L01'"}},
      {[](Arrays& a, auto&) {
         a["k.L1"].shape = {kTokens / 2, kKvHeads * 2, kDim};
       },
       {"'k.L1'", "[70, 2, 8]", "[35, 4, 8]"}},
      {[](Arrays& a, auto&) {
         a["q.L0"].shape = {1, kTokens, kQHeads, kDim};
       },
       {"'q.L0'", "[1, 70, 4, 8]"}},
      {[](Arrays& a, auto&) {
         for (const char* n : {"k.L0", "v.L0", "k.L1", "v.L1"}) {
           a[n].shape = {kTokens, 1, kKvHeads * kDim};
         }
       },
       {"'k.L0'", "[70, 1, 8]", "[70, 1, 16]"}},
      {[](Arrays& a, auto&) {
         a["v.L0"] = {"F16", {kTokens, kKvHeads, kDim}, std::string(kTokens * kKvHeads * kDim * 2, '\0')};
       },
       {"'v.L0'", "expected fp32", "found fp16"}},
      {[&](Arrays& a, auto&) {
         put_value(a["k.L1"], (66 * kKvHeads + 1) * kDim + 3, std::numeric_limits<float>::quiet_NaN());
       },
       {"'k.L1'", "position 66, head 1", "nan"}},
      {[&](Arrays& a, auto&) { put_value(a["q.L0"], 0, std::numeric_limits<float>::infinity()); },
       {"'q.L0'", "position 0", "inf"}},
      {[](Arrays& a, auto&) {
         a["tokens"] = {"I32", {3}, bytes_of(std::vector<int32_t>{1, 2, 3})};
       },
       {"'tokens'", "[70]", "[3]"}},
      {[](Arrays& a, auto&) {
         a["tokens"] = {"I32", {kTokens}, bytes_of(std::vector<int32_t>(kTokens, -5))};
       },
       {"'tokens'", "position 0"}},
      {[](Arrays&, auto& m) { m.erase("n_prompt"); }, {"n_prompt", "--prompt"}},
      {[](Arrays&, auto& m) { m["n_prompt"] = "71"; }, {"n_prompt", "from 1 to 70", "'71'"}},
      {[](Arrays&, auto& m) { m["rope_theta"] = "fast"; }, {"rope_theta", "'fast'"}},
      {[](Arrays&, auto& m) { m["n_layers"] = "1"; }, {"n_layers", "from 2", "'1'"}},
      {[](Arrays&, auto& m) { m["kv_dtype"] = "int4"; }, {"kv_dtype", "'int4'"}},
      {[&](Arrays& a, auto& m) {
         m["kv_dtype"] = "bf16";
         put_value(a["v.L1"], 7, 0.1f);
       },
       {"'v.L1'", "bf16 holds exactly"}},
      {[](Arrays& a, auto&) { a.clear(); }, {"expected tensors q.L<layer>"}},
  };
  for (const Case& each : cases) {
    SCOPED_TRACE(each.words[0]);
    Arrays arrays = two_layers();
    std::map<std::string, std::string> metadata{{"n_prompt", "12"}};
    each.change(arrays, metadata);
    write_safetensors(path("bad.safetensors"), arrays, metadata);
    std::vector<std::string> words = each.words;
    words.push_back("bad.safetensors");
    expect_refusal(import("bad.safetensors", "safetensors", "refused.kvl"), 2, words);
  }
  write_safetensors(path("good.safetensors"), two_layers(), {{"n_prompt", "12"}, {"rope_theta", "10000"}});
  expect_refusal(import("good.safetensors", "safetensors", "refused.kvl", {"--prompt", "13"}), 2,
                 {"n_prompt", "expected 13", "found 12"});
  expect_refusal(import("good.safetensors", "safetensors", "refused.kvl", {"--rope-theta", "500000"}), 2,
                 {"rope_theta", "expected 500000", "found 10000"});
  expect_refusal(import("good.safetensors", "pt", "refused.kvl"), 64,
                 {"'pt'", "expected safetensors or npz", "save_file"});
  expect_refusal(import("none.safetensors", "safetensors", "refused.kvl"), 2, {"none.safetensors"});
  write_file(path("kept.kvl"), "something");
  EXPECT_EQ(import("good.safetensors", "safetensors", "kept.kvl").exit_code, 2);
  EXPECT_EQ(import("good.safetensors", "safetensors", "kept.kvl", {"--force"}).exit_code, 0);
}

TEST_F(ImportCli, RefusesDamagedNpz) {
  ASSERT_EQ(
      run_program({"export", path("full32.kvl"), "--format", "npz", "--layers", "0:1", "-o", path("o.npz")})
          .exit_code,
      0);
  std::ifstream in(path("o.npz"), std::ios::binary);
  const std::string good{std::istreambuf_iterator<char>(in), {}};
  const auto refused = [&](const std::function<void(std::string&)>& change,
                           const std::vector<std::string>& words) {
    std::string bytes = good;
    change(bytes);
    write_file(path("bad.npz"), bytes);
    expect_refusal(import("bad.npz", "npz", "refused.kvl"), 2, words);
  };
  const size_t k = good.find("k.L0.npy"), directory = number_at<uint32_t>(good, good.size() - 6);
  ASSERT_NE(k, good.npos);
  refused([&](std::string& b) { b[k + 200] = static_cast<char>(b[k + 200] ^ 1); }, {"'k.L0'", "checksum"});
  refused([&](std::string& b) { b[directory + 10] = 8; },
          {"'content_hash'", "not compressed", "numpy.savez"});
  refused([](std::string& b) { b.resize(b.size() - 30); }, {"no zip directory"});
  refused([](std::string& b) { b = "PK"; }, {"no zip directory"});
  // Cut anywhere, or any byte of its records changed: one line, never a crash.
  const auto survives = [&](const std::string& bytes, size_t at) {
    write_file(path("bad.npz"), bytes);
    const Outcome outcome = import("bad.npz", "npz", "any.kvl", {"--force"});
    EXPECT_TRUE(outcome.exit_code == 0 || outcome.exit_code == 2) << at << ": " << outcome.err;
    EXPECT_LE(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
  };
  for (size_t at = directory; at < good.size(); at += 11) {
    std::string bytes = good;
    bytes[at] = static_cast<char>(bytes[at] + 77);
    survives(bytes, at);
  }
  for (size_t part = 1; part < 16; ++part) survives(good.substr(0, good.size() * part / 16), part);
  // Headers of arrays that lie, with a checksum that fits them.
  const auto lie = [&](const std::string& from, const std::string& to,
                       const std::vector<std::string>& words) {
    refused(
        [&](std::string& b) {
          const size_t start = b.find("\x93NUMPY", b.find("k.L0.npy")), at = b.find(from, start);
          ASSERT_LT(at, start + 128);
          b.replace(at, from.size(), to);
          const size_t entry = b.find("k.L0.npy", directory) - 46;
          const auto bytes = number_at<uint32_t>(b, entry + 24);
          Crc32 crc;
          crc.add(std::as_bytes(std::span(b).subspan(start, bytes)));
          const uint32_t value = crc.value();
          std::memcpy(b.data() + entry + 16, &value, sizeof value);
        },
        words);
  };
  lie("<f4", "<f8", {"'k.L0'", "dtype", "'<f8'"});
  lie("<f4", "<i4", {"'k.L0'", "dtype", "found I32"});
  lie("False", "True ", {"'k.L0'", "Fortran"});
  lie("'shape'", "'shope'", {"'k.L0'", "shape"});
  lie(", 4, ", ", 5, ", {"'k.L0'", "bytes of data"});
  lie("NUMPY", "NUMPX", {"'k.L0'", "npy"});
}

}  // namespace
}  // namespace kvlapse::test
