// Traces from q, k, v that another tool dumped, and the inverse of trace/export/tensor_export.h: one file a
// sequence (trace/FORMAT.md, "Tensors of other tools"). Everything is checked before the trace is made, so a
// file that is refused leaves none. Throws Error naming file, field, expected and found.
#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>

#include "core/model/tensor_file.h"
#include "trace/trace_writer.h"

namespace kvlapse {

// What the files do not say. A file that says otherwise is refused.
struct ImportFacts {
  std::optional<int> n_prompt;
  std::optional<double> rope_theta;
  std::optional<DType> kv_dtype;  // that the values are stored in; they must fit exactly
  std::string model;
};

struct ImportedTrace {
  int n_sequences = 0;
  int64_t n_tokens = 0;  // of all sequences
  int layer_begin = 0, layer_end = 0;
  CacheGeometry geometry;
  int64_t evicted =
      0;  // (kv head, token) pairs that the source had evicted; a trace here holds no such thing
  bool tokens_known = true;
  bool interrupted = false;
  int64_t file_bytes = 0;
};

struct ImportOptions {
  bool force = false;  // replace an existing file
  // Positions done and in total; false ends the trace there, marked as interrupted.
  std::function<bool(int64_t done, int64_t total)> progress = {};
};

enum class ImportFormat : uint8_t { safetensors, npz };

ImportedTrace import_tensors(std::span<const std::filesystem::path> files, ImportFormat format,
                             const ImportFacts& facts, const std::filesystem::path& trace,
                             const ImportOptions& options = {});

}  // namespace kvlapse
