// Exports of q, k, v and of what was held, as one safetensors or one npz file. Rows are copied in bounded
// pieces, so a trace of any length passes through little memory. Throws Error naming the file. One thread at
// a time per call.
//
// Tensors and metadata, which `import` reads back: trace/FORMAT.md, "Tensors of other tools".
#pragma once

#include <filesystem>

#include "trace/trace_reader.h"

namespace kvlapse {

struct TensorExport {
  int sequence = 0;
  int layer_begin = -1, layer_end = -1;  // -1: all recorded ones
};

void export_safetensors(const TraceReader& trace, const TensorExport& what,
                        const std::filesystem::path& file);
void export_npz(const TraceReader& trace, const TensorExport& what, const std::filesystem::path& file);

}  // namespace kvlapse
