// A matrix product of up to 32 sequences, one launch, as one by-value argument; shared by host, kernel and
// the emulator. Every output is summed inside of one cluster of blocks, in an order that depends on the plan
// alone.
//
// What limits it beside device memory is the second-level cache, which every block asks for weights and
// activations (on an H200 times fit 5.5 TB/s; device memory gives 4.7): blocks of a cluster divide the
// columns, so that each reads a part of the activations only, and the warps of a block read them from shared
// memory.
//
// A matrix is stored as tiles of the matrix instruction, 16 rows of it a group, some groups a slab, which is
// what a cluster has at a time: step by step of 64 columns, all of the slab's groups one behind the other, so
// that a step is one run of memory and so is a slab. Inside of 32 columns, tiles take the columns in another
// order than the matrix has them: a lane's parts of two tiles are eight neighbours, which it reads of a row
// of activations at once.
#pragma once

#include <cstdint>

#include "kernels/decode/chain_args.h"

namespace kvlapse {

inline constexpr int kProductMostRows = 32;                       // sequences
inline constexpr int kProductWarps = 8;                           // that multiply
inline constexpr int kProductThreads = (kProductWarps + 2) * 32;  // one more copies weights, one adds squares
inline constexpr int kProductStepColumns = 64;
inline constexpr int kProductStepTiles = kProductStepColumns / kChainTileColumns;
inline constexpr int kProductGroupBytes = kProductStepTiles * kChainTileBytes;  // of a step
inline constexpr int kProductMostStages = 32;
// Of weights under way at a time: what is asked for beyond stands in front of the activations (chain_args.h).
inline constexpr int kProductBytesAtOnce = 96 * 1024;
// Of shared memory for weights; activations have what is left, but their least chunks in any case.
inline constexpr int kProductRingBytes = 96 * 1024;
inline constexpr int kProductChunkSteps = 4;  // of activations that are copied together
inline constexpr int kProductLeastChunks = 3, kProductMostChunks = 16;
// Between sequences: neighbours lie in different banks.
inline constexpr int kProductInputStride = kProductChunkSteps * kProductStepColumns * 2 + 64;

// Where element (row, column) of a matrix lies.
constexpr int64_t product_index(int64_t row, int64_t column, int64_t n_columns, int slab_groups) {
  const int64_t group = row / kChainTileRows, r = row % kChainTileRows;
  const int64_t step = column / kProductStepColumns, c = column % 32;
  const int64_t run =
      (group / slab_groups * (n_columns / kProductStepColumns) + step) * slab_groups + group % slab_groups;
  const int64_t tile = column % kProductStepColumns / 32 * 2 + c % 8 / 4;
  const int64_t lane = r % 8 * 4 + c / 8, word = r / 8 + c % 4 / 2 * 2;
  return (run * kProductStepTiles + tile) * kChainTileElements + lane * 8 + word * 2 + c % 2;
}

// How a bf16 matrix lies in memory: rows one behind the other, tiles as chain_index says, or slabs.
struct MatrixOrder {
  enum class Kind : uint8_t { rows, chain, slabs };
  Kind kind = Kind::rows;
  int32_t slab_groups = 1;

  constexpr int64_t index(int64_t row, int64_t column, int64_t n_columns) const {
    return kind == Kind::rows    ? row * n_columns + column
           : kind == Kind::chain ? chain_index(row, column, n_columns)
                                 : product_index(row, column, n_columns, slab_groups);
  }
  // With those that fill a group or a slab.
  constexpr int64_t stored_rows(int64_t rows) const {
    const int64_t unit = kind == Kind::rows ? 1 : kChainTileRows * slab_groups;
    return (rows + unit - 1) / unit * unit;
  }
};

// out = or += W in, or silu(gate) * up of it. A norm between two products is divided among them: the first
// also writes its new residuals times the norm's weights, as bf16, and each block's sums of their squares;
// the second takes those as its input and multiplies what comes out by 1 / rms.
struct ProductArgs {
  const uint16_t* weights;  // bf16, n_slabs x slab_groups x 16 rows of `columns`
  const uint16_t* input;    // bf16 [B, columns]
  float* out;               // [B, n_outputs]: = or, if `add`, += the product
  uint16_t* gated;  // not null: bf16 [B, n_outputs] = silu(gate) * up instead; rows as chain_gated_row

  // Of the input's norm: parts of the sums of squares of `columns` values; null without.
  const float* squares;  // [n_squares, kProductMostRows]
  int32_t n_squares;
  float eps;

  // Of the next product's norm, where this one adds: out times next_norm, parts of the sums of squares; null
  // without.
  uint16_t* scaled;        // bf16 [B, n_outputs]
  const float* next_norm;  // [n_outputs]
  float* next_squares;     // [blocks of the launch, kProductMostRows]

  int32_t n_rows, columns, n_outputs;
  int32_t n_slabs, slab_groups, cluster;  // by choose_product_slabs
  bool add;
  // By plan_product: steps of weights and chunks of activations in shared memory, steps under way, places.
  int32_t n_stages, n_chunks, copies_at_once;
  int32_t input_offset, sums_offset, small_offset;
};

// Barriers and what blocks hand over, in shared memory.
struct alignas(16) ProductSmall {
  uint64_t full[kProductMostStages], empty[kProductMostStages];
  uint64_t input_full[kProductMostChunks], input_empty[kProductMostChunks];
  uint64_t factors_full, sums_full;
  float factors[kProductMostRows];
  float squares[kProductWarps][8];
};

// Clusters of one and of two blocks that the device holds at once; 0: not to be used.
struct ProductClusters {
  int of[3] = {};
};

// How the warps that multiply divide a slab: each has `groups` of it, in `sets`; warps of a set take steps in
// turn. Blocks of a cluster write half of the sets each.
struct ProductDivision {
  int groups, sets;
};
constexpr ProductDivision product_division(int slab_groups) {
  switch (slab_groups) {
    case 2: return {1, 2};
    case 4: return {2, 2};
    case 6: return {3, 2};
    case 8: return {2, 4};
    default: return {3, 4};  // 12
  }
}
// Blocks of eight columns of the matrix instruction, which are sequences.
constexpr int product_blocks(int n_rows) {
  return n_rows <= 8 ? 1 : n_rows <= 16 ? 2 : 4;
}
// Slabs and cluster for a matrix of n_groups, by args' n_rows and columns: what reads the fewest bytes of
// weights and activations in the busiest block, in few rounds. The matrix is stored by it. Where the device
// holds no cluster, there is none (0).
void choose_product_slabs(ProductArgs& args, int64_t n_groups, const ProductClusters& clusters);
// Blocks of the launch.
int product_launch_blocks(const ProductArgs& args, const ProductClusters& clusters);
// Places in shared memory. Returns its bytes, 0 when smem_bytes are too few or the shape has no kernel:
// columns are a multiple of 64, sequences at most kProductMostRows.
int plan_product(ProductArgs& args, int smem_bytes);
// Bytes that the launch should move through device memory.
uint64_t product_bytes(const ProductArgs& args);

}  // namespace kvlapse
