// A file of query centres in the temporary folder that goes away with the object.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "core/base/rng.h"
#include "core/policy/query_centres.h"

namespace kvlapse::test {

class CentresFile {
 public:
  explicit CentresFile(const QueryCentres& centres) {
    static int counter = 0;
    path_ = std::filesystem::temp_directory_path() / ("kvlapse_centres_" + std::to_string(::getpid()) + "_" +
                                                      std::to_string(counter++) + ".safetensors");
    std::ofstream(path_, std::ios::binary) << centres.to_bytes();
  }
  ~CentresFile() { std::filesystem::remove(path_); }
  CentresFile(const CentresFile&) = delete;
  CentresFile& operator=(const CentresFile&) = delete;
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

// Some centres for a model of that shape.
inline QueryCentres some_centres(const CacheGeometry& g, double rope_theta) {
  QueryCentres centres;
  centres.n_layers = g.n_layers;
  centres.n_q_heads = g.n_q_heads;
  centres.head_dim = g.head_dim;
  centres.rope_theta = rope_theta;
  centres.n_queries = 1;
  const size_t n = static_cast<size_t>(g.n_layers) * g.n_q_heads * g.head_dim;
  for (size_t i = 0; i < n; ++i) centres.centre.push_back(unit_float(mix64(i)) - 0.5f);
  centres.magnitude.assign(n / 2, 1.0f);
  return centres;
}

}  // namespace kvlapse::test
