// npz (numpy.savez) as a TensorFile: arrays are tensors, 0-dimensional arrays are metadata as text. Only
// members that are stored as they are, 4 GiB at most; names, sizes and checksums are checked when opened.
#pragma once

#include <filesystem>
#include <memory>

#include "core/model/tensor_file.h"

namespace kvlapse {

// Throws Error naming file, array, expected and found.
std::unique_ptr<TensorFile> open_npz(const std::filesystem::path& path);

}  // namespace kvlapse
