// QueryCentres: where the queries of a model's heads lie before their rotation, fitted on recordings
// (`kvlapse calibrate`). TriAttention scores keys by them. One safetensors file:
//   centre [L, Hq, D] fp32     mean query, rotation undone, half-split pairs (j, j + D/2) as complex numbers
//   magnitude [L, Hq, D/2]     mean absolute value of each pair
//   metadata                   rope_theta, queries, traces and tokens (hashes, comma-separated)
// Immutable once loaded.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/cache/geometry.h"

namespace kvlapse {

struct QueryCentres {
  int n_layers = 0, n_q_heads = 0, head_dim = 0;
  double rope_theta = 0;
  int64_t n_queries = 0;            // behind each mean
  std::vector<std::string> traces;  // content hashes of the recordings
  std::vector<std::string> tokens;  // hashes of the token ids of their sequences
  std::vector<float> centre, magnitude;

  std::span<const float> centre_of(int layer, int q_head) const {
    return {centre.data() + index(layer, q_head) * head_dim, static_cast<size_t>(head_dim)};
  }
  std::span<const float> magnitude_of(int layer, int q_head) const {
    return {magnitude.data() + index(layer, q_head) * (head_dim / 2), static_cast<size_t>(head_dim / 2)};
  }

  // Bytes of the file, and from them. Throw Error naming `file`.
  std::string to_bytes() const;
  static QueryCentres read(const std::filesystem::path& file);

 private:
  size_t index(int layer, int q_head) const { return static_cast<size_t>(layer) * n_q_heads + q_head; }
  size_t centre_floats() const { return index(n_layers, 0) * head_dim; }
  std::string header() const;
};

// First 16 digits of the SHA-256 of a file of centres: how specs and results name it.
std::string query_centres_id(const std::filesystem::path& file);

}  // namespace kvlapse
