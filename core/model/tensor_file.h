// TensorFile: named tensors of a weight file (safetensors, one or many; GGUF), memory-mapped and validated
// when opened: every offset, size and shape is checked against the file, so the views are safe to read for as
// long as the TensorFile lives. Read-only and thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/base/tensor_type.h"

namespace kvlapse {

struct TensorView {
  std::string_view name;
  TensorType type = TensorType::f32;
  std::vector<int64_t>
      shape;  // row-major, outermost first (a GGUF `ne` reversed): a matrix is [rows, columns]
  const std::byte* data = nullptr;
  size_t bytes = 0;
  uint64_t file_offset = 0;

  int64_t elements() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
};

class TensorFile {
 public:
  virtual ~TensorFile() = default;
  virtual std::span<const TensorView> tensors() const = 0;
  virtual std::span<const std::pair<std::string, std::string>> metadata() const = 0;  // as text
  virtual std::string describe() const = 0;                                           // path, for messages
  const TensorView* find(std::string_view name) const;
  // Throws Error naming file and tensor when absent.
  const TensorView& get(std::string_view name) const;
};

// One safetensors file. Throws Error naming file, field, expected and found.
std::unique_ptr<TensorFile> open_safetensors(const std::filesystem::path& path);

// The weight files of a Hugging Face folder: model.safetensors, or every file that
// model.safetensors.index.json names.
std::vector<std::shared_ptr<const TensorFile>> open_checkpoint_files(const std::filesystem::path& folder);

// fp32 values, row-major, of any type.
void dequantize(TensorType type, const std::byte* data, int64_t n_elements, float* out);

}  // namespace kvlapse
