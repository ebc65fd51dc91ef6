#include "replay/fit_centres.h"

#include <cmath>
#include <memory>

#include "core/base/error.h"
#include "replay/replay_engine.h"
#include "replay/trace_rows.h"
#include "trace/sqlite.h"

namespace kvlapse {
namespace {

constexpr int kPieceTokens = 256;

// Adds the queries of one layer of one sequence.
void add_queries(const TraceRows& rows, int sequence, int layer, std::span<const double> frequencies,
                 std::span<double> centre, std::span<double> magnitude) {
  const auto n_heads = static_cast<size_t>(rows.geometry().n_q_heads);
  const size_t dim = static_cast<size_t>(rows.geometry().head_dim), half = dim / 2;
  const int n_tokens = rows.sequence(sequence).n_tokens;
  std::vector<float> queries(static_cast<size_t>(kPieceTokens) * n_heads * dim);
  std::vector<double> cos(half), sin(half);
  for (int first = 0; first < n_tokens; first += kPieceTokens) {
    const int n = std::min(kPieceTokens, n_tokens - first);
    rows.rows(sequence, layer, RowKind::q, first, n, queries.data());
    const float* q = queries.data();
    for (int t = first; t < first + n; ++t) {
      for (size_t j = 0; j < half; ++j) {
        cos[j] = std::cos(frequencies[j] * t);
        sin[j] = std::sin(frequencies[j] * t);
      }
      for (size_t h = 0; h < n_heads; ++h, q += dim)
        for (size_t j = 0; j < half; ++j) {
          const double a = q[j], b = q[j + half];
          centre[h * dim + j] += cos[j] * a + sin[j] * b;
          centre[h * dim + j + half] += cos[j] * b - sin[j] * a;
          magnitude[h * half + j] += std::sqrt(a * a + b * b);
        }
    }
  }
}

}  // namespace

std::string token_hash(const TraceSequence& sequence) {
  if (!sequence.tokens.empty() && sequence.tokens.front() == kNoToken) return {};
  ContentHash hash;
  hash.add("token ids");
  for (int32_t id : sequence.tokens) hash.add(int64_t{id});
  return hash.hex();
}

QueryCentres fit_centres(const std::vector<std::filesystem::path>& traces,
                         const std::function<bool(double)>& progress) {
  QueryCentres out;
  std::vector<double> centre, magnitude, frequencies;
  double done = 0;
  for (const std::filesystem::path& file : traces) {
    const TraceReader reader(file);
    const TraceRows rows(reader);
    const CacheGeometry& g = rows.geometry();
    if (rows.rope_theta() <= 0)
      fail("{}: expected a model with a plain RoPE base, found none or a scaled one", file.string());
    if (rows.layer_begin() != 0 || rows.layer_end() != g.n_layers)
      fail("{}: layers: expected all of 0:{}, found {}:{}", file.string(), g.n_layers, rows.layer_begin(),
           rows.layer_end());
    if (out.traces.empty()) {
      out.n_layers = g.n_layers;
      out.n_q_heads = g.n_q_heads;
      out.head_dim = g.head_dim;
      out.rope_theta = rows.rope_theta();
      centre.resize(static_cast<size_t>(g.n_layers) * g.n_q_heads * g.head_dim);
      magnitude.resize(centre.size() / 2);
      for (int j = 0; j < g.head_dim / 2; ++j)
        frequencies.push_back(std::pow(out.rope_theta, -2.0 * j / g.head_dim));
    }
    if (g.n_layers != out.n_layers || g.n_q_heads != out.n_q_heads || g.head_dim != out.head_dim ||
        rows.rope_theta() != out.rope_theta)
      fail(
          "{}: expected {} layers, {} query heads of {} and RoPE base {} as in {}, found {}, {} of {} and {}",
          file.string(), out.n_layers, out.n_q_heads, out.head_dim, out.rope_theta, traces[0].string(),
          g.n_layers, g.n_q_heads, g.head_dim, rows.rope_theta());
    out.traces.push_back(reader.content_hash());
    for (int s = 0; s < rows.n_sequences(); ++s) {
      if (const std::string hash = token_hash(reader.sequence(s)); !hash.empty()) out.tokens.push_back(hash);
      out.n_queries += rows.sequence(s).n_tokens;
      for (int layer = 0; layer < g.n_layers; ++layer) {
        const size_t n = static_cast<size_t>(g.n_q_heads) * g.head_dim, at = static_cast<size_t>(layer) * n;
        add_queries(rows, s, layer, frequencies, std::span(centre).subspan(at, n),
                    std::span(magnitude).subspan(at / 2, n / 2));
        done += 1.0 / (static_cast<double>(traces.size()) * rows.n_sequences() * g.n_layers);
        if (progress && !progress(done)) throw Interrupted("calibrate: interrupted");
      }
    }
  }
  const double share = 1.0 / static_cast<double>(out.n_queries);
  for (double x : centre) out.centre.push_back(static_cast<float>(x * share));
  for (double x : magnitude) out.magnitude.push_back(static_cast<float>(x * share));
  return out;
}

}  // namespace kvlapse
