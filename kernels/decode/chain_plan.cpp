#include <algorithm>

#include "kernels/decode/chain_args.h"

namespace kvlapse {

int plan_chain(ChainArgs& args, int smem_bytes) {
  // A warp takes a chunk once it has the one before, which was copied into an emptied stage: so all stages'
  // turns before last are over (waits by parity need that) when neighbouring chunks of a warp are at most
  // this far from each other.
  static_assert(kChainCopiesAtOnce <= kChainWarps);  // as many stages as that, too
  int least_stages = kChainWarps;
  int input_bytes = 0;
  for (int p = 0; p < args.n_phases; ++p) {
    const ChainPhase& phase = args.phases[p];
    const int planes = args.n_rows * (phase.norm_weight != nullptr ? 2 : 1);
    input_bytes = std::max(input_bytes, planes * (phase.columns * 2 + kChainPlanePad));
    const int chunks = (phase.columns / kChainTileColumns + kChainChunkTiles - 1) / kChainChunkTiles;
    if (chunks > kChainWarps) least_stages = std::max(least_stages, kChainWarps + chunks % kChainWarps);
  }
  const int fixed = input_bytes + static_cast<int>(sizeof(ChainSmall));
  args.n_stages = std::min((smem_bytes - fixed) / kChainStageBytes, kChainMostStages);
  if (args.n_rows > kChainMostRows || args.n_stages < least_stages) return 0;
  args.input_offset = args.n_stages * kChainStageBytes;
  args.small_offset = args.input_offset + input_bytes;
  return args.small_offset + static_cast<int>(sizeof(ChainSmall));
}

uint64_t chain_bytes(const ChainArgs& args) {
  uint64_t bytes = 0;
  for (int p = 0; p < args.n_phases; ++p)
    bytes += static_cast<uint64_t>(args.phases[p].n_groups) * kChainTileRows *
             static_cast<uint64_t>(args.phases[p].columns) * 2;
  return bytes;
}

}  // namespace kvlapse
