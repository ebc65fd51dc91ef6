#include <algorithm>

#include "kernels/decode/product_args.h"

namespace kvlapse {

void choose_product_slabs(ProductArgs& args, int64_t n_groups, const ProductClusters& clusters) {
  double fewest = 0;
  args.cluster = 0;
  for (int cluster : {1, 2})
    for (int groups : {12, 8, 6, 4, 2}) {
      if (clusters.of[cluster] < 1 ||
          (cluster > 1 && args.columns < cluster * kProductChunkSteps * kProductStepColumns))
        continue;
      const int64_t slabs = (n_groups + groups - 1) / groups;
      const int64_t rounds = (slabs + clusters.of[cluster] - 1) / clusters.of[cluster];
      if (cluster > 1 && rounds > 1) continue;  // blocks hand over one slab's sums
      // Of a column; a round costs about as much as half a row of it.
      const double rows = static_cast<double>(rounds * (groups * kChainTileRows + args.n_rows)) / cluster +
                          0.5 * static_cast<double>(rounds);
      if (args.cluster > 0 && rows >= fewest) continue;
      fewest = rows;
      args.cluster = cluster, args.slab_groups = groups, args.n_slabs = static_cast<int32_t>(slabs);
    }
}

int product_launch_blocks(const ProductArgs& args, const ProductClusters& clusters) {
  return std::min(args.n_slabs, clusters.of[args.cluster]) * args.cluster;
}

int plan_product(ProductArgs& args, int smem_bytes) {
  if (args.n_rows < 1 || args.n_rows > kProductMostRows || args.columns % kProductStepColumns != 0 ||
      args.cluster < 1)
    return 0;
  const ProductDivision division = product_division(args.slab_groups);
  const int columns = product_blocks(args.n_rows) * 8;
  const int stage = args.slab_groups * kProductGroupBytes, chunk = columns * kProductInputStride;
  // All warps' sums, of which the other block has sent half: a float of each of a group's rows and sequences.
  const int sums =
      kProductWarps * division.groups * columns * kChainTileRows * static_cast<int>(sizeof(float));
  const int free = smem_bytes - sums - static_cast<int>(sizeof(ProductSmall));
  args.n_chunks = std::clamp((free - kProductRingBytes) / chunk, kProductLeastChunks, kProductMostChunks);
  args.n_stages = std::min((free - args.n_chunks * chunk) / stage, kProductMostStages);
  // A warp waits for a stage by parity: of the turns before its own only the last may be under way. That is
  // so when the ring holds a step of every warp of a set.
  if (args.n_stages < std::max(kProductChunkSteps, kProductWarps / division.sets)) return 0;
  args.copies_at_once = std::clamp(kProductBytesAtOnce / stage, 1, args.n_stages);
  args.input_offset = args.n_stages * stage;
  args.sums_offset = args.input_offset + args.n_chunks * chunk;
  args.small_offset = args.sums_offset + sums;
  return args.small_offset + static_cast<int>(sizeof(ProductSmall));
}

uint64_t product_bytes(const ProductArgs& args) {
  const auto rows = static_cast<uint64_t>(args.n_rows), columns = static_cast<uint64_t>(args.columns),
             outputs = static_cast<uint64_t>(args.n_outputs);
  const uint64_t weights = static_cast<uint64_t>(args.n_slabs) * static_cast<uint64_t>(args.slab_groups) *
                           kChainTileRows * columns * 2;
  return weights + rows * (columns * 2 + outputs * (args.gated != nullptr ? 2 : args.add ? 8 : 4));
}

}  // namespace kvlapse
