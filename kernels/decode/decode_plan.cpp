#include "kernels/decode/decode_plan.h"

#include <algorithm>
#include <utility>

#include "core/base/error.h"

namespace kvlapse {
namespace {

constexpr int kMinStages = 4;
constexpr double kEnoughBlocks =
    0.75;                       // of the multiprocessors: deep rings keep the memory busy from fewer than all
constexpr int kShortItem = 16;  // tiles: an item's fixed cost is about as long as its copies
constexpr int kBriefItem = 64;  // tiles: launches that overlap save more than another split
constexpr int kBriefSplits = 9;  // of two blocks a multiprocessor: more were slower (H200)
constexpr uint64_t kBriefBytes =
    20 << 20;  // of a launch that leaves the memory idle for the next one's first loads

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

int output_chunks(const DecodeShape& shape) {
  return shape.group() * shape.head_dim / 4;
}
// n_splits: at most the chunks.
OutputOwners output_owners(int n_chunks, int n_splits) {
  OutputOwners owners;
  owners.scale = (n_splits << OutputOwners::kScaleBits) / n_chunks;
  for (int chunk = n_chunks - 1; chunk >= 0; --chunk)
    owners.first[chunk * owners.scale >> OutputOwners::kScaleBits] = static_cast<uint16_t>(chunk);
  owners.first[n_splits] = static_cast<uint16_t>(n_chunks);
  for (int r = 0; r < n_splits; ++r)
    owners.most = std::max(owners.most, owners.first[r + 1] - owners.first[r]);
  return owners;
}

// Groups of consumers that take the tiles of a split in turn.
struct Consumers {
  int n_groups = 1;
  int warps() const { return kDecodeTileWarps * n_groups; }
};

int softmax_rows(int n_splits, const Consumers& c) {
  return ceil_div(n_splits * c.warps(), kDecodeSoftmaxBatch) * kDecodeSoftmaxBatch;
}
// What all splits send: of softmax every warp, and of the output.
int exchange_bytes(const DecodeShape& shape, int n_splits, const Consumers& c) {
  const int output = output_owners(output_chunks(shape), n_splits).most * (shape.leave_one_out ? 32 : 16);
  return softmax_rows(n_splits, c) * kDecodeSoftmaxBytes + (n_splits == 1 ? 0 : n_splits * output);
}

int partial_bytes(const DecodeShape& shape) {
  return shape.group() * (shape.head_dim + kDecodeOutputPad) * 4;
}
// Of a warp: the logits of the tiles that it takes, and later its part of the output over them; leave one out
// keeps both.
int warp_bytes(const DecodeShape& shape, int n_splits, const Consumers& c) {
  const int tiles = ceil_div(ceil_div(shape.n_slots, kDecodeTileSlots), n_splits);
  const int logits =
      ceil_div(tiles, c.n_groups) * (kDecodeTileSlots / kDecodeTileWarps) * ((shape.group() + 1) / 2) * 8;
  return shape.leave_one_out ? logits : std::max(logits, partial_bytes(shape));
}
int logits_bytes(const DecodeShape& shape, int n_splits, const Consumers& c) {
  int all = c.warps() * warp_bytes(shape, n_splits, c);
  // Of the slots that outweigh a head's others, the whole output, what is left; sums of 8 heads.
  if (shape.leave_one_out) all += (c.warps() + 3) * partial_bytes(shape) + kMaxDecodeGroup * 4;
  return ceil_div(all, 128) * 128;
}

// Leave one out keeps the reduction beside logits and ring: wide heads leave room for that of half the warps.
bool keeps_much(const DecodeShape& shape) {
  return shape.leave_one_out && shape.group() * shape.head_dim > 1024;
}

void check(const DecodeShape& s) {
  if (s.head_dim != 32 && s.head_dim != 64 && s.head_dim != 128 && s.head_dim != 256)
    fail("decode kernel: head_dim: expected 32, 64, 128 or 256, found {}", s.head_dim);
  if (s.dtype == DType::f32)
    fail("decode kernel: dtype: expected fp16, bf16 or fp8, found {}", dtype_name(s.dtype));
  if (s.io() != DType::f16 && s.io() != DType::bf16)
    fail("decode kernel: activations: expected fp16 or bf16, found {}", dtype_name(s.io()));
  if (s.n_kv_heads < 1 || s.n_q_heads % s.n_kv_heads != 0 || s.group() < 1 || s.group() > kMaxDecodeGroup)
    fail("decode kernel: query heads per kv head: expected 1 to {}, found {} / {}", kMaxDecodeGroup,
         s.n_q_heads, s.n_kv_heads);
  if (s.batch < 1 || s.n_slots < 1)
    fail("decode kernel: expected a batch and slots, found {} and {}", s.batch, s.n_slots);
  if (static_cast<int64_t>(s.n_items()) * s.n_slots > INT32_MAX)
    fail("decode kernel: expected at most 2^31 - 1 slots of all heads, found {} x {}", s.n_items(),
         s.n_slots);
}

// As many items as keep the device busy with a block each, and no more.
bool fills_once(const DecodeShape& shape, const DecodeLimits& limits) {
  return shape.n_items() >= kEnoughBlocks * limits.n_multiprocessors &&
         shape.n_items() <= limits.n_multiprocessors;
}

// Two blocks a multiprocessor hide the fixed cost of short items, up to eight a block (H100 and H200, 1024
// slots), and of few items that are not long. Not when blocks are between one and two to a multiprocessor
// anyway; fp8 items that fill the device once are cut in two for it (H200, 3276 slots: 5 %).
bool wants_two_blocks(const DecodeShape& shape, const DecodeLimits& limits, const DecodeTuning& tuning) {
  const int items = shape.n_items(), blocks = limits.n_multiprocessors;
  const bool halves = shape.fp8() && fills_once(shape, limits);
  return limits.clusters && tuning.splits == 0 && tuning.stages == 0 && tuning.ctas == 0 &&
         ceil_div(shape.n_slots, kDecodeTileSlots) <=
             (4 * items <= blocks || halves ? kBriefItem : kShortItem) &&
         shape.row_bytes() * kDecodeTileSlots * 4 <= 65536 &&  // four stages fit half the shared memory
         !(shape.leave_one_out && shape.group() * shape.head_dim > 512) &&
         (items < kEnoughBlocks * blocks || halves || (items > blocks && items <= 8 * blocks));
}

}  // namespace

DecodePlan plan_decode(const DecodeShape& shape, const DecodeLimits& limits, const DecodeTuning& tuning) {
  check(shape);
  const int tile_bytes =
      kDecodeTileSlots * static_cast<int>(shape.row_bytes() + (shape.fp8() ? sizeof(float) : 0));
  const int tiles = ceil_div(shape.n_slots, kDecodeTileSlots);
  const int most = std::min({limits.max_splits, kMaxDecodeSplits, output_chunks(shape)});
  const int per_multiprocessor = tuning.blocks_per_multiprocessor > 0      ? tuning.blocks_per_multiprocessor
                                 : wants_two_blocks(shape, limits, tuning) ? 2
                                                                           : 1;

  DecodePlan plan;
  plan.bulk = limits.clusters;
  const int most_warps = per_multiprocessor > 1 || keeps_much(shape)
                             ? paired_decode_warps(shape.head_dim, shape.fp8() && !shape.leave_one_out)
                             : max_decode_warps(shape.head_dim);
  // The system keeps 1 KB of every block's shared memory.
  const int smem_bytes = (limits.smem_bytes + 1024) / per_multiprocessor - 1024;
  auto fixed_bytes = [&](int splits, const Consumers& c) {
    return kDecodeSmallBytes + logits_bytes(shape, splits, c) + exchange_bytes(shape, splits, c);
  };
  // A stage belongs to one group, so stages come in multiples of the groups: as many stages as fit that leave
  // at most a fifth of the warps idle.
  auto cut = [&](int splits, int most_stages) {
    std::pair<Consumers, int> best{{}, 0};
    Consumers c;
    int groups = most_warps / kDecodeTileWarps;
    if (tuning.groups > 0) groups = std::min(groups, tuning.groups);
    for (c.n_groups = groups; c.n_groups > 0 && (5 * c.n_groups >= 4 * groups || best.second < kMinStages);
         --c.n_groups) {
      int stages =
          std::min({(smem_bytes - fixed_bytes(splits, c)) / tile_bytes, most_stages, kMaxDecodeStages});
      stages -= stages % c.n_groups;
      if (stages > best.second) best = {c, stages};
    }
    return best;
  };
  auto fits = [&](int splits) { return cut(splits, kMaxDecodeStages).second >= kMinStages; };
  auto threads = [&](int splits) { return (cut(splits, kMaxDecodeStages).first.warps() + 1) * 32; };
  auto resident = [&](int splits, int bytes) {
    const int most_blocks = limits.n_multiprocessors * per_multiprocessor;
    return limits.resident_clusters
               ? std::min(most_blocks / splits, limits.resident_clusters(splits, threads(splits), bytes))
               : most_blocks / splits;
  };

  int splits = tuning.splits;
  if (splits == 0) {
    splits = 1;
    while (splits < most && !fits(splits)) ++splits;
    // More splits while blocks are few, as long as every item still has its cluster at once and the longest
    // split becomes shorter.
    const int least = splits, most_useful = std::min(
                                  most, per_multiprocessor == 1 ? tiles : std::min(tiles / 2, kBriefSplits));
    const double enough =
        kEnoughBlocks * limits.n_multiprocessors * (fills_once(shape, limits) ? per_multiprocessor : 1);
    for (int more = splits + 1; more <= most_useful && shape.n_items() * splits < enough; ++more)
      if (ceil_div(tiles, more) < ceil_div(tiles, splits) && resident(more, smem_bytes) >= shape.n_items())
        splits = more;
    // A few clusters that leave room for those of the next launch.
    if (per_multiprocessor == 1 && tiles <= kBriefItem && 4 * shape.n_items() <= limits.n_multiprocessors)
      while (splits > least && resident(splits, smem_bytes) < 2 * shape.n_items()) --splits;
  }
  if (splits < 1 || splits > most || !fits(splits))
    fail(
        "decode kernel: {} slots of {} query heads do not fit {} bytes of shared memory in {} splits (at "
        "most {})",
        shape.n_slots, shape.group(), smem_bytes, splits, most);

  plan.n_splits = splits;
  const auto [consumers, stages] = cut(splits, tuning.stages > 0 ? tuning.stages : kMaxDecodeStages);
  plan.n_groups = consumers.n_groups;
  plan.n_threads = (consumers.warps() + 1) * 32;
  plan.warp_bytes = warp_bytes(shape, splits, consumers);
  plan.logits_bytes = logits_bytes(shape, splits, consumers);
  plan.softmax_rows = softmax_rows(splits, consumers);
  plan.partial_offset = shape.leave_one_out ? consumers.warps() * plan.warp_bytes : 0;
  plan.n_stages = stages;
  plan.owners = output_owners(output_chunks(shape), splits);
  plan.small_offset =
      plan.n_stages * tile_bytes + plan.logits_bytes + exchange_bytes(shape, splits, consumers);
  plan.smem_bytes = plan.small_offset + kDecodeSmallBytes;

  // Short items wait for state that they did not ask for early; long ones, and cp.async, whose copies share a
  // scoreboard with pending loads, lose by asking (H100).
  const bool shorts = ceil_div(tiles, splits) <= kShortItem;
  plan.state_ahead =
      plan.bulk && (tuning.ahead == ReadAhead::chosen ? shorts : tuning.ahead == ReadAhead::yes);

  plan.next_early = shape.kv_bytes(shape.n_slots) <= kBriefBytes;

  const int at_once = resident(splits, plan.smem_bytes);
  if (at_once < 1)
    fail("decode kernel: no cluster of {} blocks with {} bytes of shared memory fits", splits,
         plan.smem_bytes);
  const int rounds = ceil_div(shape.n_items(), at_once);
  plan.n_ctas = ceil_div(shape.n_items(), rounds) * splits;
  if (tuning.ctas > 0)
    plan.n_ctas = std::clamp(tuning.ctas / splits, 1, std::min(at_once, shape.n_items())) * splits;
  return plan;
}

uint64_t decode_bytes(const DecodeShape& shape, int slots, FusedScore score, bool shared) {
  const uint64_t per_slot = static_cast<uint64_t>(shape.n_items()) * slots * 4;
  uint64_t bytes = shape.kv_bytes(slots) + 2 * shape.kv_bytes(1);  // the new rows: read and written
  bytes +=
      2 * static_cast<uint64_t>(shape.batch) * shape.n_q_heads * shape.head_dim * dtype_bytes(shape.io());
  if (shape.fp8()) bytes += 2 * per_slot;
  if (score == FusedScore::leave_one_out) bytes += shape.kv_bytes(slots) / 2 + (shape.fp8() ? per_slot : 0);
  if (score_uses_norm(score)) bytes += per_slot;
  if (score_accumulates(score)) bytes += 2 * per_slot;
  if (shared && score != FusedScore::none) bytes += 2 * per_slot;
  return bytes;
}

}  // namespace kvlapse
