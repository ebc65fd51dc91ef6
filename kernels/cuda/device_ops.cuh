// The machine operations that kernels are written in, one thin wrapper each, inline PTX among them; what only
// some need is in rkv_ops.cuh and exact_ops.cuh. tests/support/kernels/emulated_device.h defines the same
// names for the CPU, so that the kernels' logic (pipelines, barriers, fragment layouts, exchanges) is tested
// without a GPU. Shared memory is addressed by 32-bit addresses (SmemAddress). Fragment layouts: PTX ISA,
// mma.m16n8k16.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/base/fp8.h"

#define KVLAPSE_DEVICE __device__ __forceinline__
#define KVLAPSE_UNROLL _Pragma("unroll")
#define KVLAPSE_UNROLL_2 _Pragma("unroll 2")
#define KVLAPSE_UNROLL_8 _Pragma("unroll 8")
#define KVLAPSE_NO_UNROLL _Pragma("unroll 1")

namespace kvlapse::device {

struct F16 {};  // element tags
struct Bf16 {};
struct E4m3 {};
using TensorMap = CUtensorMap;
using SmemAddress = uint32_t;

struct alignas(16) Float4 {
  float x, y, z, w;
};

KVLAPSE_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
KVLAPSE_DEVICE int block_index() {
  return static_cast<int>(blockIdx.x);
}
KVLAPSE_DEVICE int block_count() {
  return static_cast<int>(gridDim.x);
}
// Of a grid with rows of blocks.
KVLAPSE_DEVICE int block_row() {
  return static_cast<int>(blockIdx.y);
}
KVLAPSE_DEVICE int block_rows() {
  return static_cast<int>(gridDim.y);
}

// ---- shared memory ----
KVLAPSE_DEVICE SmemAddress smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
KVLAPSE_DEVICE void smem_store4(SmemAddress at, Float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}
KVLAPSE_DEVICE Float4 smem_load4(SmemAddress at) {
  Float4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(at)
               : "memory");
  return v;
}
KVLAPSE_DEVICE void smem_store(SmemAddress at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}
KVLAPSE_DEVICE float smem_load(SmemAddress at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
KVLAPSE_DEVICE void smem_store_u64(SmemAddress at, uint64_t v) {
  asm volatile("st.shared.b64 [%0], %1;" ::"r"(at), "l"(v) : "memory");
}
KVLAPSE_DEVICE uint64_t smem_load_u64(SmemAddress at) {
  uint64_t v;
  asm volatile("ld.shared.b64 %0, [%1];" : "=l"(v) : "r"(at) : "memory");
  return v;
}

// ---- mbarriers ----
KVLAPSE_DEVICE void mbarrier_init(SmemAddress bar, uint32_t count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// Makes initialised barriers visible to the copy engine and, before a cluster barrier, to the cluster.
KVLAPSE_DEVICE void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
KVLAPSE_DEVICE void mbarrier_arrive(SmemAddress bar) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(bar) : "memory");
}
KVLAPSE_DEVICE void mbarrier_arrive_expect(SmemAddress bar, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(bar),
               "r"(bytes)
               : "memory");
#endif
}
// By the lane that arrives; all lanes come here.
KVLAPSE_DEVICE void mbarrier_arrive_expect(bool arrives, SmemAddress bar, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred p; .reg .b64 state; setp.ne.u32 p, %2, 0; @p mbarrier.arrive.expect_tx.shared::cta.b64 "
      "state, "
      "[%0], %1; }" ::"r"(bar),
      "r"(bytes), "r"(static_cast<uint32_t>(arrives))
      : "memory");
#endif
}
KVLAPSE_DEVICE void mbarrier_wait(SmemAddress bar, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(bar), "r"(parity)
                 : "memory");
#endif
  }
}

// ---- copies into shared memory ----
// Orders this thread's ordinary shared-memory stores before later writes by the copy engine.
KVLAPSE_DEVICE void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
KVLAPSE_DEVICE uint64_t evict_first_policy() {
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}
KVLAPSE_DEVICE uint64_t evict_normal_policy() {
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}
// 64 rows from y on of plane w of a 4-D tensor map, in boxes that lie behind one another; completes on `bar`
// by bytes. By the lane that issues; all lanes come here: a branch around it costs the issuing lane a loop
// over lanes.
KVLAPSE_DEVICE void bulk_load_tile(bool issues, SmemAddress to, const TensorMap* map, int y, int w,
                                   SmemAddress bar, uint64_t policy) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %7, 0; @p cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier"
      "::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %3, %5}], [%2], %6; }" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(bar), "r"(0), "r"(y), "r"(w), "l"(policy),
      "r"(static_cast<uint32_t>(issues))
      : "memory");
#endif
}
// `bytes` in a row, a multiple of 16, both ends 16-byte aligned; completes on `bar` by bytes.
KVLAPSE_DEVICE void bulk_load(SmemAddress to, const void* from, uint32_t bytes, SmemAddress bar,
                              uint64_t policy) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
#endif
}
KVLAPSE_DEVICE void prefetch_tensor_map(const TensorMap* map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
#endif
}
// The value is worked out before what follows is waited for.
KVLAPSE_DEVICE void computed_here(uint32_t& value) {
  asm volatile("" : "+r"(value));
}
// Brings the line at `p` into L2.
KVLAPSE_DEVICE void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}
// `bytes` in a row, a multiple of 16, from a 16-byte aligned address.
KVLAPSE_DEVICE void bulk_prefetch_l2(const void* from, uint32_t bytes, uint64_t policy) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(__cvta_generic_to_global(from)),
      "r"(bytes), "l"(policy)
      : "memory");
#endif
}
KVLAPSE_DEVICE void bulk_prefetch_l2(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
#endif
}
// 4, 8 or 16 bytes, or zeros when !valid.
KVLAPSE_DEVICE void copy_async4(SmemAddress to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(valid ? 4 : 0)
               : "memory");
}
KVLAPSE_DEVICE void copy_async8(SmemAddress to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(valid ? 8 : 0)
               : "memory");
}
KVLAPSE_DEVICE void copy_async16(SmemAddress to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Arrives on `bar` once this thread's earlier copies of these kinds have landed.
KVLAPSE_DEVICE void copy_async_arrive(SmemAddress bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
}

// ---- matrix fragments ----
KVLAPSE_DEVICE void load_matrix4(uint32_t (&r)[4], SmemAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
KVLAPSE_DEVICE void load_matrix4_transposed(uint32_t (&r)[4], SmemAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
KVLAPSE_DEVICE uint32_t transpose_matrix(uint32_t r) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(r));
  return out;
}
template <class Element>
KVLAPSE_DEVICE void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
KVLAPSE_DEVICE void multiply_add_16x8x16<F16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
KVLAPSE_DEVICE void multiply_add_16x8x16<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers ----
KVLAPSE_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <class Element>
KVLAPSE_DEVICE uint32_t pack2(float low, float high);
template <>
KVLAPSE_DEVICE uint32_t pack2<F16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
KVLAPSE_DEVICE uint32_t pack2<Bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <class Element>
KVLAPSE_DEVICE void unpack2(uint32_t packed, float& low, float& high);
template <>
KVLAPSE_DEVICE void unpack2<F16>(uint32_t packed, float& low, float& high) {
  const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&packed));
  low = f.x, high = f.y;
}
template <>
KVLAPSE_DEVICE void unpack2<Bf16>(uint32_t packed, float& low, float& high) {
  low = __uint_as_float(packed << 16), high = __uint_as_float(packed & 0xffff0000u);
}
// Four e4m3 bytes as fp16 pairs: bytes 0 and 2, bytes 1 and 3. Exact.
KVLAPSE_DEVICE void widen_e4m3_apart(uint32_t bytes, uint32_t& even, uint32_t& odd) {
#if __CUDA_ARCH__ >= 890
  asm("{ .reg .b32 p; .reg .b16 low, high; prmt.b32 p, %2, 0, 0x3120; mov.b32 {low, high}, p; "
      "cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
      : "=r"(even), "=r"(odd)
      : "r"(bytes));
#else
  // Exponent and mantissa one place to the right of the sign are 2^-8 of the value (NaN bytes become 480).
  const uint32_t low = ((bytes << 8) & 0x80008000u) | ((bytes << 7) & 0x3f803f80u);
  const uint32_t high = (bytes & 0x80008000u) | ((bytes >> 1) & 0x3f803f80u);
  const __half2 scale = __floats2half2_rn(256.0f, 256.0f);
  const __half2 a = __hmul2(*reinterpret_cast<const __half2*>(&low), scale),
                b = __hmul2(*reinterpret_cast<const __half2*>(&high), scale);
  even = *reinterpret_cast<const uint32_t*>(&a), odd = *reinterpret_cast<const uint32_t*>(&b);
#endif
}
// The same in order: bytes 0 and 1, bytes 2 and 3.
KVLAPSE_DEVICE void widen_e4m3(uint32_t bytes, uint32_t& low, uint32_t& high) {
#if __CUDA_ARCH__ >= 890
  asm("{ .reg .b16 first, second; mov.b32 {first, second}, %2; cvt.rn.f16x2.e4m3x2 %0, first; "
      "cvt.rn.f16x2.e4m3x2 %1, second; }"
      : "=r"(low), "=r"(high)
      : "r"(bytes));
#else
  widen_e4m3_apart(__byte_perm(bytes, 0, 0x3120), low, high);
#endif
}
// Four numbers as e4m3 bytes, the first in the lowest: f32_to_e4m3's bits.
KVLAPSE_DEVICE uint32_t narrow_e4m3(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
  uint32_t bytes;
  asm("{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1; "
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3; mov.b32 %0, {low, high}; }"
      : "=r"(bytes)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return bytes;
#else
  return f32_to_e4m3(a) | f32_to_e4m3(b) << 8 | f32_to_e4m3(c) << 16 |
         static_cast<uint32_t>(f32_to_e4m3(d)) << 24;
#endif
}
KVLAPSE_DEVICE uint32_t float_bits(float v) {
  return __float_as_uint(v);
}
KVLAPSE_DEVICE float bits_float(uint32_t v) {
  return __uint_as_float(v);
}
KVLAPSE_DEVICE float exponential(float x) {
  return expf(x);
}
KVLAPSE_DEVICE float larger(float a, float b) {
  return fmaxf(a, b);
}
KVLAPSE_DEVICE float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KVLAPSE_DEVICE float square_root(float x) {
  return sqrtf(x);
}
KVLAPSE_DEVICE float inverse_square_root(float x) {
  return rsqrtf(x);
}
// Set bits of the lowest n.
KVLAPSE_DEVICE int bits_below(uint32_t bits, int n) {
  return __popc(n < 32 ? bits & ((1u << n) - 1) : bits);
}

// ---- warp and block ----
KVLAPSE_DEVICE uint32_t warp_ballot(bool v) {
  return __ballot_sync(0xffffffffu, v);
}
KVLAPSE_DEVICE void shared_add(uint64_t* to, uint64_t v) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(v));
}
KVLAPSE_DEVICE void shared_increment(uint32_t* to) {
  atomicAdd(to, 1u);
}
KVLAPSE_DEVICE void global_max(int32_t* to, int32_t v) {
  atomicMax(to, v);
}
KVLAPSE_DEVICE void global_max(uint64_t* to, uint64_t v) {
  atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(v));
}
// The count before this one.
KVLAPSE_DEVICE uint32_t shared_append(uint32_t* count) {
  return atomicAdd(count, 1u);
}
template <class T>
KVLAPSE_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T>
KVLAPSE_DEVICE T shuffle_from(T v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}
KVLAPSE_DEVICE uint32_t warp_largest(uint32_t v) {
  return __reduce_max_sync(0xffffffffu, v);
}
KVLAPSE_DEVICE uint32_t warp_smallest(uint32_t v) {
  return __reduce_min_sync(0xffffffffu, v);
}
KVLAPSE_DEVICE void warp_sync() {
  __syncwarp();
}
KVLAPSE_DEVICE void block_sync() {
  __syncthreads();
}
KVLAPSE_DEVICE void named_barrier(int id, int n_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

// ---- cluster ----
KVLAPSE_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// Orders nothing but barriers behind fence_barrier_init: a release waits for device memory first.
KVLAPSE_DEVICE void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
KVLAPSE_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// The address of the same shared memory in another CTA of the cluster.
KVLAPSE_DEVICE SmemAddress remote_address(SmemAddress local, int rank) {
  uint32_t remote = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
#endif
  return remote;
}
// Seen by the other CTA behind the next cluster barrier.
KVLAPSE_DEVICE void remote_store(SmemAddress to, uint32_t v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
#endif
}
// Stores 16 bytes to another CTA and completes them on a barrier of that CTA.
KVLAPSE_DEVICE void remote_store4(SmemAddress to, Float4 v, SmemAddress bar) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
          to),
      "r"(__float_as_uint(v.x)), "r"(__float_as_uint(v.y)), "r"(__float_as_uint(v.z)),
      "r"(__float_as_uint(v.w)), "r"(bar)
      : "memory");
#endif
}

// ---- device-wide ----
// Adds one and wraps to zero after `last`; orders this thread's (and, behind a barrier, its block's) earlier
// writes before it and later reads after it. Returns the old value.
KVLAPSE_DEVICE uint32_t count_arrival(uint32_t* counter, uint32_t last) {
  __threadfence();
  const uint32_t old = atomicInc(counter, last);
  __threadfence();
  return old;
}
// A barrier among `n` resident blocks on one zero-initialised word, reusable (as cooperative_groups' grid
// barrier: the top bit flips when all have arrived). Called by one thread of each block.
KVLAPSE_DEVICE void resident_barrier(uint32_t* word, int rank, int n) {
  const uint32_t add = rank == 0 ? 0x80000000u - static_cast<uint32_t>(n - 1) : 1u;
  const size_t at = __cvta_generic_to_global(word);
  uint32_t old, now;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(at), "r"(add) : "memory");
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(at) : "memory");
  while (((old ^ now) & 0x80000000u) == 0);
}
// Past L1.
KVLAPSE_DEVICE float load_shared_by_device(const float* p) {
  return __ldcg(p);
}
KVLAPSE_DEVICE Float4 load_shared_by_device(const Float4* p) {
  const float4 v = __ldcg(reinterpret_cast<const float4*>(p));
  return {v.x, v.y, v.z, v.w};
}
KVLAPSE_DEVICE uint64_t load_shared_by_device(const uint64_t* p) {
  return __ldcg(reinterpret_cast<const unsigned long long*>(p));
}
// 32 bits that are kept as two times 16, the lower ones first; 4-byte aligned.
KVLAPSE_DEVICE uint32_t load_bits(const uint16_t* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}
KVLAPSE_DEVICE void store_bits(uint16_t* p, uint32_t bits) {
  *reinterpret_cast<uint32_t*>(p) = bits;
}
// Words of a value and a tag, each written and read as one; a pair is 16-byte aligned. A pair is as it is
// now: who wants `tag` in both asks again.
struct TaggedPair {
  uint32_t values[2], tags[2];
};
KVLAPSE_DEVICE void store_tagged(uint64_t* to, uint32_t value, uint32_t tag) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)),
               "l"(static_cast<uint64_t>(tag) << 32 | value)
               : "memory");
}
KVLAPSE_DEVICE TaggedPair load_tagged(const uint64_t* pair, uint32_t /*tag*/) {
  uint64_t a, b;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(a), "=l"(b)
               : "l"(__cvta_generic_to_global(pair))
               : "memory");
  return {{static_cast<uint32_t>(a), static_cast<uint32_t>(b)},
          {static_cast<uint32_t>(a >> 32), static_cast<uint32_t>(b >> 32)}};
}
// Programmatic dependent launch: waits until the kernels before this one are complete and visible; lets the
// next one start.
KVLAPSE_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
KVLAPSE_DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace kvlapse::device
