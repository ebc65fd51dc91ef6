// The operations of kernels/cuda/device_ops.cuh on the CPU: every GPU thread is a fiber, scheduled in random
// order from a seed; copies and remote stores complete late and out of order. Kernel text that includes this
// instead of device_ops.cuh runs as it is, so barriers, pipelines, fragment layouts and exchanges are tested
// without a GPU: a wrong wait count deadlocks (and is reported), a missing barrier makes results depend on
// the seed. Warp-wide operations check that all 32 lanes meet in the same one. Not emulated: caches, proxies,
// memory order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "core/base/fp8.h"

#define KVLAPSE_DEVICE inline
#define KVLAPSE_UNROLL
#define KVLAPSE_UNROLL_2
#define KVLAPSE_UNROLL_8
#define KVLAPSE_NO_UNROLL

namespace kvlapse::device {

struct EmulatedLaunch {
  int n_blocks = 1;
  int n_threads = 32;
  int cluster = 1;
  int smem_bytes = 0;
  uint64_t seed = 0;
  int n_columns = 0;  // blocks of a row of the grid; 0: there is one row
};
// Runs `body(shared memory)` in every thread. Throws Error on deadlock, divergence or an access out of
// bounds.
void run_emulated(const EmulatedLaunch& launch, const std::function<void(unsigned char*)>& body);

struct F16 {};
struct Bf16 {};
struct E4m3 {};
// An array of elements [w][y][x], read 64 rows at a time in boxes of box_x elements that lie behind one
// another.
struct TensorMap {
  const void* base = nullptr;
  int nx = 0, ny = 0, nw = 0, box_x = 0, element_bytes = 2;
};
using SmemAddress = uint32_t;
struct alignas(16) Float4 {
  float x, y, z, w;
};

int thread_index();
int block_index();
int block_count();
int block_row();
int block_rows();
SmemAddress smem_address(const void* pointer);
void* smem_pointer(SmemAddress at, int bytes);  // of this block; checks bounds

inline void smem_store4(SmemAddress at, Float4 v) {
  std::memcpy(smem_pointer(at, 16), &v, 16);
}
inline Float4 smem_load4(SmemAddress at) {
  Float4 v;
  std::memcpy(&v, smem_pointer(at, 16), 16);
  return v;
}
inline void smem_store(SmemAddress at, float v) {
  std::memcpy(smem_pointer(at, 4), &v, 4);
}
inline void smem_store_u64(SmemAddress at, uint64_t v) {
  std::memcpy(smem_pointer(at, 8), &v, 8);
}

inline uint64_t smem_load_u64(SmemAddress at) {
  uint64_t v;
  std::memcpy(&v, smem_pointer(at, 8), 8);
  return v;
}
inline float smem_load(SmemAddress at) {
  float v;
  std::memcpy(&v, smem_pointer(at, 4), 4);
  return v;
}

void mbarrier_init(SmemAddress bar, uint32_t count);
inline void fence_barrier_init() {}
void mbarrier_arrive(SmemAddress bar);
void mbarrier_arrive_expect(SmemAddress bar, uint32_t bytes);
inline void mbarrier_arrive_expect(bool arrives, SmemAddress bar, uint32_t bytes) {
  if (arrives) mbarrier_arrive_expect(bar, bytes);
}
void mbarrier_wait(SmemAddress bar, uint32_t parity);
inline void fence_proxy_async() {}
inline uint64_t evict_first_policy() {
  return 0;
}
inline uint64_t evict_normal_policy() {
  return 0;
}
void bulk_load_tile(bool issues, SmemAddress to, const TensorMap* map, int y, int w, SmemAddress bar,
                    uint64_t policy);
void bulk_load(SmemAddress to, const void* from, uint32_t bytes, SmemAddress bar, uint64_t policy);
inline void prefetch_tensor_map(const TensorMap*) {}
inline void computed_here(uint32_t&) {}
inline void prefetch_l2(const void*) {}
inline void bulk_prefetch_l2(const void*, uint32_t) {}
inline void bulk_prefetch_l2(const void*, uint32_t, uint64_t) {}
inline Float4 load_once(const Float4* from) {
  return *from;
}
void copy_async4(SmemAddress to, const void* from, bool valid);
void copy_async8(SmemAddress to, const void* from, bool valid);
void copy_async16(SmemAddress to, const void* from, bool valid);
void copy_async_arrive(SmemAddress bar);

// What every lane of the warp passed, in lane order; valid until the lane's next warp-wide operation.
const void* warp_exchange(const char* operation, const void* value, int bytes);
template <class T>
const T* warp_exchange(const char* operation, const T& value) {
  return static_cast<const T*>(warp_exchange(operation, &value, static_cast<int>(sizeof(T))));
}
int lane_index();

void load_matrix4(uint32_t (&r)[4], SmemAddress row);
void load_matrix4_transposed(uint32_t (&r)[4], SmemAddress row);
uint32_t transpose_matrix(uint32_t r);
template <class Element>
uint32_t pack2(float low, float high);
template <class Element>
void unpack2(uint32_t packed, float& low, float& high);
template <class Element>
void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands* all = warp_exchange("mma", Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int j = 0; j < 4; ++j) {
    const int row = g + (j / 2) * 8, column = 2 * t + j % 2;
    float sum = c[j];
    for (int k = 0; k < 16; k += 2) {
      float a_low, a_high, b_low, b_high;
      unpack2<Element>(all[(row % 8) * 4 + (k % 8) / 2].a[row / 8 + (k / 8) * 2], a_low, a_high);
      unpack2<Element>(all[column * 4 + (k % 8) / 2].b[k / 8], b_low, b_high);
      sum += a_low * b_low;
      sum += a_high * b_high;
    }
    c[j] = sum;
  }
}

template <class Element>
void multiply_add_16x8x8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  multiply_add_16x8x16<Element>(c, {a0, a1, 0, 0}, b, 0);
}

void widen_e4m3(uint32_t bytes, uint32_t& low, uint32_t& high);
void widen_e4m3_apart(uint32_t bytes, uint32_t& even, uint32_t& odd);

inline float exp2_approximate(float x) {
  return std::exp2(x);
}
inline uint32_t float_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline float exponential(float x) {
  return std::exp(x);
}
inline float larger(float a, float b) {
  return std::fmax(a, b);
}
inline uint32_t narrow_e4m3(float a, float b, float c, float d) {
  return f32_to_e4m3(a) | f32_to_e4m3(b) << 8 | f32_to_e4m3(c) << 16 |
         static_cast<uint32_t>(f32_to_e4m3(d)) << 24;
}
inline float reciprocal_approximate(float x) {
  return 1.0f / x;
}
inline float square_root(float x) {
  return std::sqrt(x);
}
inline float inverse_square_root(float x) {
  return 1.0f / std::sqrt(x);
}
inline int bits_below(uint32_t bits, int n) {
  return __builtin_popcount(n < 32 ? bits & ((1u << n) - 1) : bits);
}
inline uint32_t warp_ballot(bool v) {
  const bool* all = warp_exchange("ballot", v);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i]) << i;
  return bits;
}
inline void shared_increment(uint32_t* to) {
  ++*to;
}
inline void global_max(int32_t* to, int32_t v) {
  if (v > *to) *to = v;
}
inline void global_max(uint64_t* to, uint64_t v) {
  if (v > *to) *to = v;
}
inline uint32_t shared_append(uint32_t* count) {
  return (*count)++;
}
inline void shared_add(uint64_t* to, uint64_t v) {
  *to += v;
}
inline void shared_add(int32_t* to, int32_t v) {
  *to += v;
}
inline int32_t shared_add_before(int32_t* to, int32_t v) {
  *to += v;
  return *to - v;
}
inline int32_t round_to_int(float v) {
  return static_cast<int32_t>(std::lrint(v));
}
inline uint32_t thread_index_again() {
  return static_cast<uint32_t>(thread_index());
}
void check_index(int i, int n);  // 0 <= i < n
template <class T>
T shuffle_xor(T v, int mask) {
  return warp_exchange("shuffle", v)[lane_index() ^ mask];
}
template <class T>
T shuffle_from(T v, int lane) {
  return warp_exchange("shuffle from", v)[lane];
}
inline uint32_t warp_largest(uint32_t v) {
  const uint32_t* all = warp_exchange("largest", v);
  for (int i = 0; i < 32; ++i) v = all[i] > v ? all[i] : v;
  return v;
}
inline int32_t warp_sum(int32_t v) {
  const int32_t* all = warp_exchange("sum", v);
  v = 0;
  for (int i = 0; i < 32; ++i) v += all[i];
  return v;
}
inline uint32_t warp_smallest(uint32_t v) {
  const uint32_t* all = warp_exchange("smallest", v);
  for (int i = 0; i < 32; ++i) v = all[i] < v ? all[i] : v;
  return v;
}
inline void warp_sync() {
  warp_exchange("sync", 0);
}
void named_barrier(int id, int n_threads);
void block_sync();

void cluster_arrive();
inline void cluster_arrive_relaxed() {
  cluster_arrive();
}
void cluster_wait();
SmemAddress remote_address(SmemAddress local, int rank);
void remote_store(SmemAddress to, uint32_t v);
void remote_add(SmemAddress to, int32_t v);
void remote_store4(SmemAddress to, Float4 v, SmemAddress bar);

uint32_t count_arrival(uint32_t* counter, uint32_t last);
void resident_barrier(uint32_t* word, int rank, int n);
inline float load_shared_by_device(const float* p) {
  return *p;
}
inline Float4 load_shared_by_device(const Float4* p) {
  return *p;
}
inline uint32_t load_bits(const uint16_t* p) {
  return p[0] | static_cast<uint32_t>(p[1]) << 16;
}
inline void store_bits(uint16_t* p, uint32_t bits) {
  p[0] = static_cast<uint16_t>(bits), p[1] = static_cast<uint16_t>(bits >> 16);
}
inline uint64_t load_shared_by_device(const uint64_t* p) {
  return *p;
}
struct TaggedPair {
  uint32_t values[2], tags[2];
};
inline void store_tagged(uint64_t* to, uint32_t value, uint32_t tag) {
  *to = static_cast<uint64_t>(tag) << 32 | value;
}
TaggedPair load_tagged(const uint64_t* pair, uint32_t tag);  // once both have the tag
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

}  // namespace kvlapse::device
