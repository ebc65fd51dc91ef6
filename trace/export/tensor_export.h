// Exports of q, k, v and of what was held, as one safetensors or one npz file. Rows are copied in bounded
// pieces, so a trace of any length passes through little memory. Throws Error naming the file. One thread at
// a time per call.
//
// Tensors of one sequence, T positions, for each recorded layer L:
//   q.L<L> [T, Hq, D], k.L<L> and v.L<L> [T, H, D]   post-RoPE; the file's dtype (npz has no bf16: widened to
//   fp32) mask.L<L> [H, T] int32   last step whose attention saw the token, 2147483647 when it was held to
//   the end: token i
//                            takes part in step t when i <= t <= mask[h][i]
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
