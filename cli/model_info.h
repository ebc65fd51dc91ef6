// What is in a model: geometry, storage types, bytes of its K/V cache, tokenizer. `kvlapse info MODEL` prints
// it.
#pragma once

#include <filesystem>
#include <vector>

#include "cli/command.h"
#include "core/base/dtype.h"

namespace kvlapse::cli {

// A GGUF file, or a folder with config.json or one GGUF file.
bool is_model_path(const std::filesystem::path& path);

// `lengths`: token counts to give the cache's bytes for; empty: a few up to the model's context.
Json model_info(const std::filesystem::path& path, DType kv_dtype, std::vector<int64_t> lengths);
void print_model_info(const Json& info);

}  // namespace kvlapse::cli
