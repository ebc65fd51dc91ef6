#include "core/policy/query_centres.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>

#include "core/base/error.h"
#include "core/base/sha256.h"

namespace kvlapse {
namespace {

std::string read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(in), {}};
  if (!in.is_open() || in.bad())
    fail("{}: cannot be read; expected a file that `kvlapse calibrate` made", path.string());
  return bytes;
}

std::vector<std::string> split(std::string_view text) {
  std::vector<std::string> parts;
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    parts.emplace_back(text.substr(0, comma));
    text.remove_prefix(std::min(comma + 1, text.size()));
  }
  return parts;
}

// What stands between `before` and the next `end` of the header; "" when it does not.
std::string_view between(std::string_view header, std::string_view before, char end) {
  const size_t at = header.find(before);
  if (at == std::string_view::npos) return {};
  const std::string_view rest = header.substr(at + before.size());
  return rest.substr(0, std::min(rest.find(end), rest.size()));
}

template <typename T>
T number(std::string_view text) {
  T value{};
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

}  // namespace

std::string QueryCentres::header() const {
  const size_t split_at = centre_floats() * sizeof(float),
               end = split_at + centre_floats() / 2 * sizeof(float);
  std::string text = fmt::format(
      "{{\"__metadata__\":{{\"format\":\"kvlapse query centres\",\"rope_theta\":\"{}\",\"queries\":\"{}\","
      "\"traces\":\"{}\",\"tokens\":\"{}\"}},"
      "\"centre\":{{\"dtype\":\"F32\",\"shape\":[{},{},{}],\"data_offsets\":[0,{}]}},"
      "\"magnitude\":{{\"dtype\":\"F32\",\"shape\":[{},{},{}],\"data_offsets\":[{},{}]}}}}",
      rope_theta, n_queries, fmt::join(traces, ","), fmt::join(tokens, ","), n_layers, n_q_heads, head_dim,
      split_at, n_layers, n_q_heads, head_dim / 2, split_at, end);
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + text;  // little endian
}

std::string QueryCentres::to_bytes() const {
  std::string out = header();
  for (const std::vector<float>* values : {&centre, &magnitude})
    out.append(reinterpret_cast<const char*>(values->data()), values->size() * sizeof(float));
  return out;
}

// Only files that to_bytes() made: the header must be the one that its own facts give. (The general reader of
// safetensors belongs to core/model, which policies do not know.)
QueryCentres QueryCentres::read(const std::filesystem::path& path) {
  const std::string bytes = read_file(path);
  const std::string_view text = std::string_view(bytes).substr(0, std::min<size_t>(bytes.size(), 1 << 20));
  QueryCentres out;
  out.rope_theta = number<double>(between(text, "\"rope_theta\":\"", '"'));
  out.n_queries = number<int64_t>(between(text, "\"queries\":\"", '"'));
  out.traces = split(between(text, "\"traces\":\"", '"'));
  out.tokens = split(between(text, "\"tokens\":\"", '"'));
  const std::vector<std::string> shape =
      split(between(text, "\"centre\":{\"dtype\":\"F32\",\"shape\":[", ']'));
  if (shape.size() == 3) {
    out.n_layers = number<int>(shape[0]);
    out.n_q_heads = number<int>(shape[1]);
    out.head_dim = number<int>(shape[2]);
  }
  constexpr int kMost = 1 << 16;
  const bool plausible = out.n_layers > 0 && out.n_layers < kMost && out.n_q_heads > 0 &&
                         out.n_q_heads < kMost && out.head_dim > 0 && out.head_dim < kMost &&
                         out.head_dim % 2 == 0 && out.rope_theta > 0 && out.n_queries > 0;
  const std::string header = plausible ? out.header() : "";
  if (!plausible || !std::string_view(bytes).starts_with(header))
    fail("{}: expected a file that `kvlapse calibrate` made, found another header", path.string());
  const size_t n_centre = out.centre_floats(), n = n_centre + n_centre / 2;
  if (bytes.size() != header.size() + n * sizeof(float))
    fail("{}: expected {} bytes, found {}", path.string(), header.size() + n * sizeof(float), bytes.size());
  out.centre.resize(n_centre);
  out.magnitude.resize(n_centre / 2);
  std::memcpy(out.centre.data(), bytes.data() + header.size(), n_centre * sizeof(float));
  std::memcpy(out.magnitude.data(), bytes.data() + header.size() + n_centre * sizeof(float),
              n_centre / 2 * sizeof(float));
  for (const auto& [name, values] : {std::pair{"centre", &out.centre}, {"magnitude", &out.magnitude}})
    if (const auto bad =
            std::find_if(values->begin(), values->end(), [](float x) { return !std::isfinite(x); });
        bad != values->end())
      fail("{}: {}[{}]: expected finite numbers, found {}", path.string(), name, bad - values->begin(), *bad);
  return out;
}

std::string query_centres_id(const std::filesystem::path& path) {
  const std::string bytes = read_file(path);
  return sha256_hex(std::as_bytes(std::span(bytes))).substr(0, 16);
}

}  // namespace kvlapse
