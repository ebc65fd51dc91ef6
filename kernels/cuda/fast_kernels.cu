#include <algorithm>

#include "core/base/rng.h"
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/fast_args.h"

namespace kvlapse {
namespace {

constexpr int kGemvThreads = 256, kGemvWarps = kGemvThreads / 32;
constexpr int kGemvBlocksPerMultiprocessor = 2;
constexpr int kChunksAhead = 4;  // 16-byte loads of a lane in flight for each of its matrix rows
constexpr int kRowsAtOnce = 2;   // matrix rows of a warp
constexpr int kLaneColumns = 8;  // of one such load
constexpr int kWarpColumns = 32 * kLaneColumns;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

// The same sum in every thread; `shared` holds a float for each warp.
__device__ __forceinline__ float block_sum(float v, float* shared) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += shared[w];
  __syncthreads();
  return total;
}

__device__ __forceinline__ float silu(float g) {
  return g / (1.0f + __expf(-g));
}

__device__ __forceinline__ float low_half(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_half(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ float squares(float4 v) {
  return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
}
__device__ __forceinline__ float4 scaled(float4 v, float factor, float4 weight) {
  return make_float4(v.x * factor * weight.x, v.y * factor * weight.y, v.z * factor * weight.z,
                     v.w * factor * weight.w);
}

__device__ __forceinline__ uint2 four_halves(float4 v) {
  return make_uint2(device::pack2<device::Bf16>(v.x, v.y), device::pack2<device::Bf16>(v.z, v.w));
}

// A row of activations lies in two planes of float4, so that a lane reads eight neighbouring columns without
// bank conflicts: columns 8i .. 8i+3 in the first, 8i+4 .. 8i+7 in the second. Where the c-th four columns
// are.
__device__ __forceinline__ int plane_index(int c, int columns) {
  return c % 2 * (columns / 8) + c / 2;
}

constexpr int kKept = 4;  // float4 of x that a thread keeps

template <int kRows>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocksPerMultiprocessor)
    gemv_kernel(const __grid_constant__ GemvArgs a) {
  extern __shared__ __align__(16) float in[];  // [kRows][two planes]
  __shared__ float sums[kGemvWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int n_tasks = a.paired ? a.n_outputs : (a.n_outputs + 1) / 2;
  const int n_chunks = (a.columns + kWarpColumns - 1) / kWarpColumns;
  const int stride = static_cast<int>(gridDim.x) * kGemvWarps;
  int task = warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);

  auto row_of = [&](int t, int i) {
    const int row = a.paired ? t + i * a.n_outputs : 2 * t + i;
    return !a.paired && row >= a.n_outputs ? 2 * t : row;  // an odd row out is read twice
  };
  uint4 ahead[kRowsAtOnce][kChunksAhead];
  auto load = [&](int t, int chunk) {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const __nv_bfloat16* row = a.weights + static_cast<int64_t>(row_of(t, i)) * a.columns;
#pragma unroll
      for (int u = 0; u < kChunksAhead; ++u) {
        const int column = (chunk + u) * kWarpColumns + lane * kLaneColumns;
        ahead[i][u] = column < a.columns ? __ldcs(reinterpret_cast<const uint4*>(row + column))
                                         : make_uint4(0, 0, 0, 0);
      }
    }
  };
  // Weights do not depend on the kernel in front.
  if (task < n_tasks) load(task, 0);
  float4 scale[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int c = static_cast<int>(threadIdx.x) + i * kGemvThreads;
    if (a.norm_weight != nullptr && c < a.columns / 4)
      scale[i] = __ldg(reinterpret_cast<const float4*>(a.norm_weight) + c);
  }
  device::allow_next_kernel();
  device::wait_for_previous_kernel();

#pragma unroll
  for (int b = 0; b < kRows; ++b) {
    float4* to = reinterpret_cast<float4*>(in + b * a.columns);
    if (a.norm_weight != nullptr) {
      const float4* x = reinterpret_cast<const float4*>(a.x + static_cast<int64_t>(b) * a.columns);
      // What fits is kept in registers: one wait for x.
      float4 kept[kKept];
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int c = static_cast<int>(threadIdx.x) + i * kGemvThreads;
        kept[i] = c < a.columns / 4 ? x[c] : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kKept; ++i) sum += squares(kept[i]);
      for (int c = static_cast<int>(threadIdx.x) + kKept * kGemvThreads; c < a.columns / 4; c += kGemvThreads)
        sum += squares(x[c]);
      const float factor = rsqrtf(block_sum(sum, sums) / static_cast<float>(a.columns) + a.eps);
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int c = static_cast<int>(threadIdx.x) + i * kGemvThreads;
        if (c < a.columns / 4) to[plane_index(c, a.columns)] = scaled(kept[i], factor, scale[i]);
      }
      for (int c = static_cast<int>(threadIdx.x) + kKept * kGemvThreads; c < a.columns / 4; c += kGemvThreads)
        to[plane_index(c, a.columns)] =
            scaled(x[c], factor, reinterpret_cast<const float4*>(a.norm_weight)[c]);
    } else {
      const uint4* x = reinterpret_cast<const uint4*>(a.input + static_cast<int64_t>(b) * a.columns);
#pragma unroll 4
      for (int c = static_cast<int>(threadIdx.x); c < a.columns / 8; c += kGemvThreads) {
        const uint4 v = x[c];
        to[c] = make_float4(low_half(v.x), high_half(v.x), low_half(v.y), high_half(v.y));
        to[a.columns / 8 + c] = make_float4(low_half(v.z), high_half(v.z), low_half(v.w), high_half(v.w));
      }
    }
  }
  __syncthreads();

  for (; task < n_tasks; task += stride) {
    float sum[kRowsAtOnce][kRows] = {};
    for (int chunk = 0; chunk < n_chunks; chunk += kChunksAhead) {
      uint4 now[kRowsAtOnce][kChunksAhead];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i)
#pragma unroll
        for (int u = 0; u < kChunksAhead; ++u) now[i][u] = ahead[i][u];
      if (chunk + kChunksAhead < n_chunks)
        load(task, chunk + kChunksAhead);
      else if (task + stride < n_tasks)
        load(task + stride, 0);
#pragma unroll
      for (int u = 0; u < kChunksAhead; ++u) {
        const int column = (chunk + u) * kWarpColumns + lane * kLaneColumns;
        if (column >= a.columns) break;
#pragma unroll
        for (int b = 0; b < kRows; ++b) {
          const float4* plane = reinterpret_cast<const float4*>(in + b * a.columns);
          const float4 low = plane[column / 8], high = plane[a.columns / 8 + column / 8];
          const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i) {
            const uint32_t words[4] = {now[i][u].x, now[i][u].y, now[i][u].z, now[i][u].w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              sum[i][b] = fmaf(low_half(words[k]), x[2 * k], sum[i][b]);
              sum[i][b] = fmaf(high_half(words[k]), x[2 * k + 1], sum[i][b]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      const float first = warp_sum(sum[0][b]), second = warp_sum(sum[1][b]);
      if (lane != 0) continue;
      const int64_t at = static_cast<int64_t>(b) * a.out_stride;
      if (a.paired) {
        a.out_bf16[at + task] = __float2bfloat16(silu(first) * second);
        continue;
      }
      float* out = a.out + at + 2 * task;
      out[0] = a.add ? out[0] + first : first;
      if (2 * task + 1 < a.n_outputs) out[1] = a.add ? out[1] + second : second;
    }
  }
}

constexpr int kNormThreads = 512;
constexpr int kNormKept = 4;  // float4 of x that a thread keeps

__global__ void __launch_bounds__(kNormThreads) fast_norm_kernel(const __grid_constant__ FastNormArgs a) {
  __shared__ float sums[kNormThreads / 32];
  device::allow_next_kernel();
  const int n = a.width / 4, thread = static_cast<int>(threadIdx.x);
  const float4* weight = reinterpret_cast<const float4*>(a.weight);
  float4 scale[kNormKept], kept[kNormKept];
#pragma unroll
  for (int i = 0; i < kNormKept; ++i)
    if (thread + i * kNormThreads < n) scale[i] = weight[thread + i * kNormThreads];
  device::wait_for_previous_kernel();
  const float4* x = reinterpret_cast<const float4*>(a.x + static_cast<int64_t>(blockIdx.x) * a.width);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kNormKept; ++i)
    kept[i] = thread + i * kNormThreads < n ? __ldcg(x + thread + i * kNormThreads) : make_float4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kNormKept; ++i) sum += squares(kept[i]);
  for (int c = thread + kNormKept * kNormThreads; c < n; c += kNormThreads) sum += squares(__ldcg(x + c));
  const float factor = rsqrtf(block_sum(sum, sums) / static_cast<float>(a.width) + a.eps);
  uint2* out = reinterpret_cast<uint2*>(a.out + static_cast<int64_t>(blockIdx.x) * a.width);
#pragma unroll
  for (int i = 0; i < kNormKept; ++i)
    if (thread + i * kNormThreads < n)
      out[thread + i * kNormThreads] = four_halves(scaled(kept[i], factor, scale[i]));
  for (int c = thread + kNormKept * kNormThreads; c < n; c += kNormThreads)
    out[c] = four_halves(scaled(__ldcg(x + c), factor, weight[c]));
}

constexpr int kMostPairs = 4;  // of a lane: head_dim up to 256

// A warp a head.
__global__ void __launch_bounds__(128) fast_qkv_kernel(const __grid_constant__ FastQkvArgs a) {
  device::allow_next_kernel();
  const int n_heads = a.n_q_heads + 2 * a.n_kv_heads, dim = a.head_dim, half = dim / 2;
  const int item = static_cast<int>(blockIdx.x) * 4 + static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool there = item < a.n_rows * n_heads;
  const int b = there ? item / n_heads : 0, head = item % n_heads;
  const bool is_q = head < a.n_q_heads, is_v = head >= a.n_q_heads + a.n_kv_heads;
  const float* bias = a.bias != nullptr ? a.bias + head * dim : nullptr;
  const float* norm = is_q ? a.q_norm : is_v ? nullptr : a.k_norm;
  // Constants of the step (positions change between steps alone) are asked for before the kernel in front
  // ends.
  const float* rope = a.rope + static_cast<int64_t>(a.pos[b]) * dim;
  float cosine[kMostPairs], sine[kMostPairs], low_scale[kMostPairs], high_scale[kMostPairs];
#pragma unroll
  for (int i = 0; i < kMostPairs; ++i) {
    const int d = lane + 32 * i;
    const bool inside = d < half;
    cosine[i] = inside && !is_v ? rope[d] : 1.0f;
    sine[i] = inside && !is_v ? rope[half + d] : 0.0f;
    low_scale[i] = inside && norm != nullptr ? norm[d] : 1.0f;
    high_scale[i] = inside && norm != nullptr ? norm[d + half] : 1.0f;
  }
  device::wait_for_previous_kernel();
  if (!there) return;
  const float* from = a.qkv + static_cast<int64_t>(item) * dim;
  __nv_bfloat16* to =
      is_q   ? a.q + (static_cast<int64_t>(b) * a.n_q_heads + head) * dim
      : is_v ? a.v + (static_cast<int64_t>(b) * a.n_kv_heads + head - a.n_q_heads - a.n_kv_heads) * dim
             : a.k + (static_cast<int64_t>(b) * a.n_kv_heads + head - a.n_q_heads) * dim;
  float low[kMostPairs], high[kMostPairs], sum = 0;
#pragma unroll
  for (int i = 0; i < kMostPairs; ++i) {
    const int d = lane + 32 * i;
    low[i] = d < half ? __ldcg(from + d) : 0;
    high[i] = d < half ? __ldcg(from + d + half) : 0;
  }
#pragma unroll
  for (int i = 0; i < kMostPairs; ++i) {
    const int d = lane + 32 * i;
    if (bias != nullptr && d < half) low[i] += bias[d], high[i] += bias[d + half];
    sum += low[i] * low[i] + high[i] * high[i];
  }
  const float factor = norm != nullptr ? rsqrtf(warp_sum(sum) / static_cast<float>(dim) + a.eps) : 1.0f;
#pragma unroll
  for (int i = 0; i < kMostPairs; ++i) {
    const int d = lane + 32 * i;
    if (d >= half) continue;
    const float x = low[i] * (factor * low_scale[i]), y = high[i] * (factor * high_scale[i]);
    to[d] = __float2bfloat16(x * cosine[i] - y * sine[i]);
    to[d + half] = __float2bfloat16(y * cosine[i] + x * sine[i]);
  }
}

__global__ void __launch_bounds__(256) fast_silu_kernel(const __grid_constant__ FastSiluArgs a) {
  device::allow_next_kernel();
  const int64_t n = static_cast<int64_t>(a.n_rows) * a.n;
  device::wait_for_previous_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= n) return;
  const int64_t at = i / a.n * 2 * a.n + i % a.n;
  a.act[i] = __float2bfloat16(silu(__bfloat162float(a.both[at])) * __bfloat162float(a.both[at + a.n]));
}

__global__ void __launch_bounds__(256) fast_embed_kernel(const __grid_constant__ FastEmbedArgs a) {
  device::allow_next_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= static_cast<int64_t>(a.n_rows) * a.width) return;
  const int64_t token = a.tokens[i / a.width], column = i % a.width;
  a.x[i] = __bfloat162float(a.embedding[a.order.index(token, column, a.width)]);
}

constexpr int kArgmaxBlocks = 32;  // a row

__global__ void __launch_bounds__(256) fast_argmax_kernel(const __grid_constant__ FastArgmaxArgs a) {
  device::allow_next_kernel();
  device::wait_for_previous_kernel();
  const int row = static_cast<int>(blockIdx.x) / kArgmaxBlocks,
            part = static_cast<int>(blockIdx.x) % kArgmaxBlocks;
  const float* logits = a.logits + static_cast<int64_t>(row) * a.n_vocab;
  unsigned long long best = 0;
  for (int i = part * 256 + static_cast<int>(threadIdx.x); i < a.n_vocab; i += kArgmaxBlocks * 256) {
    const unsigned long long key = logit_key(__float_as_uint(logits[i]), static_cast<uint32_t>(i));
    best = key > best ? key : best;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const unsigned long long other = __shfl_xor_sync(0xffffffffu, best, mask);
    best = other > best ? other : best;
  }
  if (threadIdx.x % 32 == 0) atomicMax(a.best + row, best);
}

// Of the largest logit_key.
__device__ int32_t token_of(unsigned long long best) {
  return static_cast<int32_t>(~static_cast<uint32_t>(best));
}

__global__ void __launch_bounds__(256) fast_advance_kernel(const __grid_constant__ FastAdvanceArgs a) {
  device::allow_next_kernel();
  device::wait_for_previous_kernel();
  for (int b = static_cast<int>(threadIdx.x); b < a.n_rows; b += 256) {
    a.tokens[b] = token_of(a.best[b]);
    a.best[b] = 0;
    ++a.pos[b];
  }
  if (threadIdx.x == 0) ++*a.step;
}

constexpr int kReportThreads = 1024;

// A block a sequence.
__global__ void __launch_bounds__(kReportThreads)
    fast_report_kernel(const __grid_constant__ FastReportArgs a) {
  __shared__ float sums[32], seconds[32];
  device::allow_next_kernel();
  device::wait_for_previous_kernel();
  const int row = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int64_t report = static_cast<int64_t>(*a.step % a.n_reports) * a.n_rows + row;
  const int n_keys = a.n_layers * a.n_victims;
  for (int i = thread; i < n_keys; i += kReportThreads) {
    const int64_t item =
        (static_cast<int64_t>(i / a.n_victims) * a.n_rows + row) * a.n_kv_heads + i % a.n_victims;
    uint64_t key = ~uint64_t{0};
    for (int split = 0; split < a.n_splits; ++split) key = min(key, a.keys[item * kMaxDecodeSplits + split]);
    a.victims[report * n_keys + i] = key;
  }
  const float* logits = a.logits + static_cast<int64_t>(row) * a.n_vocab;
  const int32_t token = token_of(a.best[row]);
  const float best = logits[token];
  float sum = 0, second = -INFINITY;
  for (int i = thread; i < a.n_vocab; i += kReportThreads) {
    const float logit = logits[i];
    sum += __expf(logit - best);
    if (i != token) second = fmaxf(second, logit);
  }
  const auto reduce = [&] {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
      sum += __shfl_xor_sync(0xffffffffu, sum, mask);
      second = fmaxf(second, __shfl_xor_sync(0xffffffffu, second, mask));
    }
  };
  reduce();
  if (thread % 32 == 0) sums[thread / 32] = sum, seconds[thread / 32] = second;
  __syncthreads();
  if (thread >= 32) return;
  sum = sums[thread], second = seconds[thread];
  reduce();
  if (thread == 0) a.choices[report] = {token, -__logf(sum), best - second, *a.flags};
}

struct FillArgs {
  __nv_bfloat16* halves;
  float* floats;
  uint64_t n, seed;
  float value;
};
__global__ void __launch_bounds__(256) fill_kernel(const __grid_constant__ FillArgs a) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * 256;
  for (uint64_t i = blockIdx.x * uint64_t{256} + threadIdx.x; i < a.n; i += stride) {
    if (a.floats != nullptr) {
      a.floats[i] = a.value;
      continue;
    }
    const uint64_t bits = mix64(a.seed ^ mix64(i));
    const float sum = static_cast<float>((bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) +
                                         (bits >> 48));
    a.halves[i] = __float2bfloat16((sum / 65536.0f - 2.0f) * 1.7320508f * a.value);
  }
}

LaunchShape shape_of(int64_t n_blocks, int n_threads, bool dependent = true) {
  LaunchShape shape;
  shape.n_blocks = static_cast<int>(n_blocks);
  shape.n_threads = n_threads;
  shape.dependent = dependent;
  return shape;
}
int64_t blocks_for(int64_t n, int64_t per_block) {
  return (n + per_block - 1) / per_block;
}

}  // namespace

bool gemv_fits(int n_rows, int columns, int smem_bytes) {
  return n_rows <= kGemvMostRows && columns % kLaneColumns == 0 &&
         static_cast<int64_t>(n_rows) * columns * 4 + 256 <= smem_bytes;
}

void launch_gemv(cudaStream_t stream, const GemvArgs& args, int n_multiprocessors, LaunchLog* log) {
  void (*const kernels[kGemvMostRows])(GemvArgs) = {gemv_kernel<1>, gemv_kernel<2>, gemv_kernel<3>,
                                                    gemv_kernel<4>};
  const auto kernel = kernels[args.n_rows - 1];
  const int n_tasks = args.paired ? args.n_outputs : (args.n_outputs + 1) / 2;
  LaunchShape shape = shape_of(
      std::min<int64_t>(n_multiprocessors * kGemvBlocksPerMultiprocessor, blocks_for(n_tasks, kGemvWarps)),
      kGemvThreads);
  shape.smem_bytes = args.n_rows * args.columns * 4;
  KVLAPSE_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, shape.smem_bytes));
  const uint64_t rows = static_cast<uint64_t>(args.n_outputs) * (args.paired ? 2 : 1);
  launch_kernel(stream, {"gemv", rows * static_cast<uint64_t>(args.columns) * 2, log}, shape, kernel, args);
}

void launch_fast_norm(cudaStream_t stream, const FastNormArgs& a, LaunchLog* log) {
  const uint64_t bytes = static_cast<uint64_t>(a.n_rows) * static_cast<uint64_t>(a.width) * 6;
  launch_kernel(stream, {"norm", bytes, log}, shape_of(a.n_rows, kNormThreads), fast_norm_kernel, a);
}
void launch_fast_qkv(cudaStream_t stream, const FastQkvArgs& a, LaunchLog* log) {
  const int64_t heads = static_cast<int64_t>(a.n_rows) * (a.n_q_heads + 2 * a.n_kv_heads);
  launch_kernel(stream, {"finish_qkv", static_cast<uint64_t>(heads * a.head_dim * 6), log},
                shape_of(blocks_for(heads, 4), 128), fast_qkv_kernel, a);
}
void launch_fast_silu(cudaStream_t stream, const FastSiluArgs& a, LaunchLog* log) {
  const int64_t n = static_cast<int64_t>(a.n_rows) * a.n;
  launch_kernel(stream, {"silu", static_cast<uint64_t>(n * 6), log}, shape_of(blocks_for(n, 256), 256),
                fast_silu_kernel, a);
}
void launch_fast_embed(cudaStream_t stream, const FastEmbedArgs& a, LaunchLog* log) {
  const int64_t n = static_cast<int64_t>(a.n_rows) * a.width;
  launch_kernel(stream, {"embed", static_cast<uint64_t>(n * 6), log},
                shape_of(blocks_for(n, 256), 256, false), fast_embed_kernel, a);
}
void launch_fast_argmax(cudaStream_t stream, const FastArgmaxArgs& a, LaunchLog* log) {
  const uint64_t bytes = static_cast<uint64_t>(a.n_rows) * static_cast<uint64_t>(a.n_vocab) * 4;
  launch_kernel(stream, {"argmax", bytes, log}, shape_of(int64_t{a.n_rows} * kArgmaxBlocks, 256),
                fast_argmax_kernel, a);
}
void launch_fast_report(cudaStream_t stream, const FastReportArgs& a, LaunchLog* log) {
  const uint64_t victims = static_cast<uint64_t>(a.n_layers) * a.n_victims * (a.n_splits + 1) * 8;
  launch_kernel(stream,
                {"report", static_cast<uint64_t>(a.n_rows) * (a.n_vocab * uint64_t{4} + victims), log},
                shape_of(a.n_rows, kReportThreads), fast_report_kernel, a);
}
void launch_fast_advance(cudaStream_t stream, const FastAdvanceArgs& a, LaunchLog* log) {
  launch_kernel(stream, {"advance", static_cast<uint64_t>(a.n_rows) * 24, log}, shape_of(1, 256),
                fast_advance_kernel, a);
}
void launch_fill_normal(cudaStream_t stream, __nv_bfloat16* data, uint64_t n, uint64_t seed,
                        float deviation) {
  launch_kernel(stream, {"fill_normal", n * 2, nullptr}, shape_of(2048, 256, false), fill_kernel,
                FillArgs{data, nullptr, n, seed, deviation});
}
void launch_fill_value(cudaStream_t stream, float* data, uint64_t n, float value) {
  launch_kernel(stream, {"fill_value", n * 4, nullptr}, shape_of(256, 256, false), fill_kernel,
                FillArgs{nullptr, data, n, 0, value});
}

}  // namespace kvlapse
