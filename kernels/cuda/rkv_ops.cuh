// Operations that the R-KV kernel uses beside device_ops.cuh.
#pragma once

#include "kernels/cuda/device_ops.cuh"

namespace kvlapse::device {

KVLAPSE_DEVICE void shared_add(int32_t* to, int32_t v) {
  atomicAdd(to, v);
}
// The value before.
KVLAPSE_DEVICE int32_t shared_add_before(int32_t* to, int32_t v) {
  return atomicAdd(to, v);
}
// Seen by the other CTA behind the next cluster barrier, as a remote store.
KVLAPSE_DEVICE void remote_add(SmemAddress to, int32_t v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.cluster.shared::cluster.add.s32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
#endif
}
KVLAPSE_DEVICE int32_t warp_sum(int32_t v) {
  return __reduce_add_sync(0xffffffffu, v);
}
KVLAPSE_DEVICE int32_t round_to_int(float v) {
  return __float2int_rn(v);
}
template <class Element>
KVLAPSE_DEVICE void multiply_add_16x8x8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b);
template <>
KVLAPSE_DEVICE void multiply_add_16x8x8<F16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(b));
}
template <>
KVLAPSE_DEVICE void multiply_add_16x8x8<Bf16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}
// What is read for the last time: L2 keeps everything else before it.
KVLAPSE_DEVICE Float4 load_once(const Float4* from) {
#if __CUDA_ARCH__ >= 900
  Float4 v;
  asm volatile("ld.global.L2::cache_hint.v4.f32 {%0,%1,%2,%3}, [%4], %5;"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(__cvta_generic_to_global(from)), "l"(evict_first_policy()));
  return v;
#else
  return *from;
#endif
}
// As thread_index(), asked anew: the answer of before is not kept in a register.
KVLAPSE_DEVICE uint32_t thread_index_again() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
// Indices are checked by the emulator only.
KVLAPSE_DEVICE void check_index(int, int) {}

}  // namespace kvlapse::device
