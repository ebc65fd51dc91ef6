// Attention over CpuKvStores by a team of threads: logits of all slots, softmax, then values in chunks of 256
// slots added in order. The work is split over (row, kv head, chunk); no split changes a bit.
#pragma once

#include <span>
#include <vector>

#include "kernels/cpu/cpu_kv_store.h"
#include "kernels/cpu/thread_team.h"

namespace kvlapse {

struct CpuAttendRow {
  CpuKvStore* store = nullptr;
  const SlotTable* table = nullptr;
  float* out = nullptr;  // [Hq][D], may be null: the store keeps the output in any case
};

class CpuAttention {
 public:
  explicit CpuAttention(ThreadTeam& team) : team_(team), scratch_(team.size()) {}

  void decode(std::span<const CpuAttendRow> rows);
  // Rows r < n_rows with queries q + r * q_stride attend slots [0, first_slots + r]; outputs likewise
  // [Hq][D].
  void block(const CpuKvStore& store, int n_rows, int first_slots, const float* q, size_t q_stride,
             float* out, size_t out_stride);

 private:
  // Slots [begin, end) of one kv head of one row; a unit of work.
  struct Unit {
    int row = 0, kv_head = 0, chunk = 0, n_slots = 0;
  };
  void block_tile(const CpuKvStore& store, int row, int n_rows, int first_slots, int kv_head, const float* q,
                  size_t q_stride, float* out, size_t out_stride, std::vector<float>& scratch);

  ThreadTeam& team_;
  std::vector<Unit> units_;                  // kept between calls: no allocation in a step
  std::vector<std::vector<float>> scratch_;  // per thread
};

}  // namespace kvlapse
