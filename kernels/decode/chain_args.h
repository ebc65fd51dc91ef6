// What one launch of the product chain reads and writes, as one by-value argument; shared by host, kernel and
// the emulator.
//
// The matrix products between two attentions of a few sequences, one after another in one launch: every phase
// is a product whose input the phase before it made, in all blocks. These hand it over as words of 64 bits, a
// value and a tag that says which launch and phase made it: who reads a word finds either both or neither, so
// a value is there as soon as its word is, without fences, counters or a barrier among blocks (each of them a
// way to memory and back). A block writes a phase's words only when it has all of the phase before it, whose
// makers had all of the one before that: so nobody overwrites a word that somebody still waits for. A matrix
// is stored as tiles of the matrix instruction (below), 16 rows of it - a group - one behind the other, so
// that a block's share of a phase is one run of memory. Blocks take whole groups: every output is summed
// inside of a block, in an order that depends on the number of columns alone.
#pragma once

#include <cstdint>

namespace kvlapse {

inline constexpr int kChainTileRows = 16, kChainTileColumns = 16;
inline constexpr int kChainTileElements = kChainTileRows * kChainTileColumns;
inline constexpr int kChainTileBytes = 2 * kChainTileElements;
inline constexpr int kChainChunkTiles = 16;  // neighbours along the columns: one copy, one warp
inline constexpr int kChainStageBytes = kChainChunkTiles * kChainTileBytes;
inline constexpr int kChainWarps = 8;                         // that multiply
inline constexpr int kChainThreads = (kChainWarps + 2) * 32;  // one more copies, one finishes outputs
inline constexpr int kChainMostStages = 32;
// Copies under way at a time, of the stages of the ring. What a multiprocessor must have asked for to read at
// the device's rate is rate x latency, 30 to 40 KB; every byte beyond waits in the memory system's queues, in
// front of the loads of the next phase's input, and in front of the copies of the block that the others will
// wait for. The ring is deeper: it fills while an input is awaited.
inline constexpr int kChainCopiesAtOnce = 64 * 1024 / kChainStageBytes;
inline constexpr int kChainMostPhases = 4;
// Sequences: each has two of the matrix instruction's eight columns, because an fp32 activation enters as the
// sum of two bf16 values.
inline constexpr int kChainMostRows = 4;
inline constexpr int kChainPlanePad = 32;  // bytes between columns of activations, against bank conflicts

// Where element (row, column) of a matrix lies: tiles of a group along the columns; in a tile, the eight
// values that a lane of the matrix instruction holds are neighbours.
constexpr int64_t chain_index(int64_t row, int64_t column, int64_t n_columns) {
  const int64_t tile = row / kChainTileRows * (n_columns / kChainTileColumns) + column / kChainTileColumns;
  const int64_t r = row % kChainTileRows, c = column % kChainTileColumns;
  const int64_t lane = r % 8 * 4 + c % 8 / 2, word = r / 8 + c / 8 * 2;
  return tile * kChainTileElements + lane * 8 + word * 2 + c % 2;
}
// Gate and up are one matrix, eight rows of each in a group. Row r of either, in it.
constexpr int64_t chain_gated_row(int64_t r, bool up) {
  return r / 8 * 16 + r % 8 + (up ? 8 : 0);
}
constexpr int64_t chain_groups(int64_t rows) {
  return (rows + kChainTileRows - 1) / kChainTileRows;
}

// Largest for the first of the largest logits: a logit's bits in the order of the numbers, and its place.
constexpr uint64_t logit_key(uint32_t bits, uint32_t place) {
  const uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~place;
}

enum class ChainOutput : uint8_t {
  residual,  // x[b, r] += y; all such phases of a launch have as many groups: a block adds to its own rows
  gated,     // bf16(silu(gate) * up)
  heads,     // qkv[b, r] = y; bias, norm and rotation of each head give q, k and v
  logits,    // logits[b, r] = y, best[b] = max of logit_key(y, r)
};

struct ChainPhase {
  const uint16_t* weights;   // bf16, n_groups x 16 rows of `columns` as chain_index says
  const float* norm_weight;  // [columns]: the input is RMSNorm(x); null: it is the bf16 rows `input`
  const uint16_t* input;     // [B, columns] of the first phase; null: what the gated phase made
  int32_t n_groups, columns;
  int32_t n_outputs;  // values of a sequence
  ChainOutput output;
};

struct ChainArgs {
  ChainPhase phases[kChainMostPhases];
  float* x;             // [B, width of the normed phases]
  uint64_t* x_words;    // of x's values
  uint64_t* act_words;  // of pairs of the gated phase's values, bf16
  float* logits;
  uint64_t* best;  // zero before
  // Heads.
  float* qkv;                           // [B, (Hq + 2H) D]
  const float *bias, *q_norm, *k_norm;  // [(Hq + 2H) D], [D], [D]; null without
  const float* rope;                    // cos then sin of each position, D/2 each
  const int32_t* pos;                   // [B]
  uint16_t *q, *k, *v;                  // bf16 rows
  uint32_t* head_arrivals;              // [Hq + 2H] zero between launches

  // Another one than that of the launch before that used the words, which start as zeros; not 0 with more
  // than one phase.
  int32_t number;
  int32_t n_phases, n_rows;
  int32_t n_q_heads, n_kv_heads, head_dim;
  int32_t n_stages, input_offset, small_offset;  // of shared memory
  float eps;
};

// Barriers and exchange buffers in shared memory.
struct alignas(16) ChainSmall {
  uint64_t full[kChainMostStages], empty[kChainMostStages];
  uint64_t sums_full[2], sums_empty[2];
  alignas(16) float sums[2][kChainWarps][32][2];  // of a lane: rows g and g + 8 of its sequence
  float squares[kChainMostRows][kChainWarps];
};

// Fills n_stages and the offsets. Returns bytes of shared memory, 0 when smem_bytes are too few.
int plan_chain(ChainArgs& args, int smem_bytes);
// Bytes that the launch should move through device memory.
uint64_t chain_bytes(const ChainArgs& args);

}  // namespace kvlapse
