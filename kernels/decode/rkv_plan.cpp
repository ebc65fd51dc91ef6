#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/base/error.h"
#include "kernels/decode/rkv_args.h"

namespace kvlapse {

void set_rkv_scalars(RkvArgs& args, const RkvShape& s) {
  if (s.head_dim != 32 && s.head_dim != 64 && s.head_dim != 128)
    fail("rkv kernel: head_dim: expected 32, 64 or 128, found {}", s.head_dim);
  if (s.dtype != DType::f32 && s.dtype != DType::f16 && s.dtype != DType::bf16)
    fail("rkv kernel: dtype: expected fp32, fp16 or bf16, found {}", dtype_name(s.dtype));
  if (s.batch < 1 || s.n_kv_heads < 1 || s.n_q_heads % s.n_kv_heads != 0)
    fail("rkv kernel: expected a batch and query heads in groups, found {} and {} / {}", s.batch, s.n_q_heads,
         s.n_kv_heads);
  const int group = s.n_q_heads / s.n_kv_heads;
  if (s.window < 1 || s.window * group > kRkvMaxColumns)
    fail("rkv kernel: window x group: expected 1 to {}, found {} x {}", kRkvMaxColumns, s.window, group);
  if (s.n_slots > kRkvMaxSlots || s.budget <= s.window || s.budget > s.n_slots)
    fail("rkv kernel: expected window < budget <= slots <= {}, found {}, {}, {}", kRkvMaxSlots, s.window,
         s.budget, s.n_slots);
  if (s.blocks < 0 || s.blocks > kRkvMaxBlocks)
    fail("rkv kernel: blocks: expected 0 to {}, found {}", kRkvMaxBlocks, s.blocks);
  if (s.kernel % 2 == 0) fail("rkv kernel: kernel: expected an odd width, found {}", s.kernel);
  args.n_items = s.n_items();
  args.n_kv_heads = s.n_kv_heads;
  args.group = group;
  args.n_slots = s.n_slots;
  args.budget = s.budget;
  args.window = s.window;
  args.kernel = s.kernel;
  args.blocks = s.blocks < 1 ? 1 : s.blocks;
  args.key_rows = kRkvFirstKeys;
  args.logit_tiles = 0;
  args.lambda = s.lambda;
  args.threshold = s.threshold;
  args.logit_scale = std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(s.head_dim));
}

bool fit_rkv(RkvArgs& args, int head_dim, int element_bytes, int bytes, int least) {
  const int tiles = (args.n_slots + kRkvTileRows - 1) / kRkvTileRows;
  const auto fits = [&] { return rkv_layout(args, head_dim, element_bytes).bytes <= bytes; };
  args.key_rows = least;
  for (args.logit_tiles = (tiles + args.blocks - 1) / args.blocks; args.logit_tiles > 0; --args.logit_tiles)
    if (fits()) break;
  for (args.key_rows = std::max(rkv_padded(args.n_slots), least); args.key_rows >= least; args.key_rows -= 16)
    if (fits()) return true;
  return false;
}

bool fit_rkv_pair(RkvArgs& args, int head_dim, int element_bytes, int bytes) {
  constexpr int kManyKeys = 128, kFewKeys = 64;
  return fit_rkv(args, head_dim, element_bytes, bytes, kManyKeys) ||
         fit_rkv(args, head_dim, element_bytes, bytes, kFewKeys);
}

uint64_t rkv_bytes(const RkvShape& s, int held) {
  const uint64_t row = static_cast<uint64_t>(s.head_dim) * dtype_bytes(s.dtype);
  const auto items = static_cast<uint64_t>(s.n_items());
  const auto moved = static_cast<uint64_t>(held > s.budget ? held - s.budget : 0);
  return items * (static_cast<uint64_t>(held) * row + moved * row * 4);  // K and V, read and written
}

}  // namespace kvlapse
