#include "kernels/cuda/decode_attention.h"

#include <algorithm>
#include <cmath>

#include "core/base/error.h"

namespace kvlapse {
namespace {

// A box reads 128 bytes of a row: 256 at a time ask for what the other box asks for too (8 % slower on an
// H200).
constexpr CUtensorMapL2promotion kFetch = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;

// The driver's function, found at run time: the binary needs no libcuda to start.
decltype(&cuTensorMapEncodeTiled) encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  KVLAPSE_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                      cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess)
    fail("CUDA: the driver has no cuTensorMapEncodeTiled: expected driver 525 or newer");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

CUtensorMap plane_map(const DecodeShape& s, void* plane) {
  const uint64_t row = s.row_bytes();
  const auto element = static_cast<uint32_t>(dtype_bytes(s.dtype)),
             box_bytes = static_cast<uint32_t>(std::min<uint64_t>(row, 128)),
             boxes = static_cast<uint32_t>(row / box_bytes);
  const cuuint64_t dims[] = {box_bytes / element, static_cast<cuuint64_t>(s.n_slots), boxes,
                             static_cast<cuuint64_t>(s.n_items())};
  const cuuint64_t strides[] = {row, box_bytes, row * static_cast<uint64_t>(s.n_slots)};
  const cuuint32_t box[] = {box_bytes / element, kDecodeTileSlots, boxes, 1};
  const cuuint32_t step[] = {1, 1, 1, 1};
  CUtensorMap map{};
  const CUresult result = encode_function()(&map,
                                            s.fp8()                 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                            : s.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                    : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                            4, plane, dims, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                            box_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                            : box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                              : CU_TENSOR_MAP_SWIZZLE_32B,
                                            kFetch, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    fail("CUDA: tensor map of [{}, {}, {}]: error {} (planes must be 16-byte aligned)", s.n_items(),
         s.n_slots, s.head_dim, static_cast<int>(result));
  return map;
}

}  // namespace

DecodeKernel::DecodeKernel(const DecodeShape& shape, DecodePath path, const DecodeTuning& tuning)
    : shape_(shape) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor),
            minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  const bool has_bulk = major == 9;
  if (path == DecodePath::bulk && !has_bulk)
    fail("decode kernel: bulk path: expected compute capability 9.0, found {}.{}", major, minor);
  const bool bulk = path == DecodePath::bulk || (path == DecodePath::best && has_bulk);
  for (bool shares : {false, true})
    kernels_[shares] =
        shape.leave_one_out
            ? (bulk ? leave_one_out_kernel_bulk : leave_one_out_kernel_cp_async)(shape.head_dim, shape.dtype)
        : shape.fp8()
            ? (bulk ? decode_kernel_fp8_bulk : decode_kernel_fp8_cp_async)(shape.head_dim, shares)
            : (bulk ? decode_kernel_bulk : decode_kernel_cp_async)(shape.head_dim, shape.dtype, shares);
  if (kernels_[0] == nullptr)
    fail("decode kernel: no kernel for head_dim {} and {}", shape.head_dim, dtype_name(shape.dtype));

  DecodeLimits limits;
  limits.n_multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  limits.smem_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.clusters = bulk;
  limits.max_splits = kMaxDecodeSplits;
  for (auto kernel : kernels_) {
    const void* function = reinterpret_cast<const void*>(kernel);
    cudaFuncAttributes found{};
    const cudaError_t error = cudaFuncGetAttributes(&found, function);
    if (error != cudaSuccess)
      fail("decode kernel: none is built in for compute capability {}.{}: {}", major, minor,
           cudaGetErrorString(error));
    KVLAPSE_CUDA_CHECK(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.smem_bytes));
    if (bulk)
      KVLAPSE_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  if (bulk)
    limits.resident_clusters = [function = reinterpret_cast<const void*>(kernels_[1])](int n, int n_threads,
                                                                                       int bytes) {
      return resident_clusters(function, n, n_threads, bytes);
    };
  plan_ = plan_decode(shape, limits, tuning);
}

size_t DecodeKernel::split_softmax_floats() const {
  return plan_.bulk || plan_.n_splits == 1
             ? 0
             : static_cast<size_t>(shape_.n_items()) * kMaxDecodeSplits * kMaxDecodeGroup * 2;
}
size_t DecodeKernel::split_output_floats() const {
  return plan_.bulk || plan_.n_splits == 1
             ? 0
             : static_cast<size_t>(shape_.n_items()) * plan_.n_splits * shape_.group() * shape_.head_dim *
                   (shape_.leave_one_out ? 2 : 1);
}

CudaDecodeArgs DecodeKernel::arguments(void* k, void* v, FusedScore score, bool shared) const {
  if ((score == FusedScore::leave_one_out) != shape_.leave_one_out)
    fail("decode kernel: score {}: the kernel was planned {} leaving slots out", static_cast<int>(score),
         shape_.leave_one_out ? "for" : "without");
  CudaDecodeArgs args{};
  if (plan_.bulk) {
    args.k_map = plane_map(shape_, k);
    args.v_map = plane_map(shape_, v);
  }
  args.k = k;
  args.v = v;
  args.n_items = shape_.n_items();
  args.n_kv_heads = shape_.n_kv_heads;
  args.group = shape_.group();
  args.half_group = (shape_.group() + 1) / 2;
  args.n_slots = args.budget = shape_.n_slots;
  args.n_splits = plan_.n_splits;
  args.by_kv_heads = divisor_of(args.n_kv_heads);
  args.by_splits = divisor_of(args.n_splits);
  args.n_groups = plan_.n_groups;
  args.warp_bytes = plan_.warp_bytes;
  args.n_stages = plan_.n_stages;
  args.by_groups = divisor_of(plan_.n_groups);
  args.logits_bytes = plan_.logits_bytes;
  args.softmax_rows = plan_.softmax_rows;
  args.partial_offset = plan_.partial_offset;
  args.owners = plan_.owners;
  args.small_offset = plan_.small_offset;
  args.next_early = plan_.next_early;
  args.state_ahead = plan_.state_ahead;
  args.logit_scale = static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(shape_.head_dim)));
  const int heads = shared ? shape_.n_q_heads : shape_.group();
  args.score_scale = 1.0f / static_cast<float>(score_uses_norm(score) ? heads * shape_.head_dim : heads);
  args.score = score;
  args.io_bf16 = shape_.io() == DType::bf16;
  args.shared = shared;
  return args;
}

void DecodeKernel::launch(cudaStream_t stream, const CudaDecodeArgs& args, LaunchLog* log) const {
  auto require = [](bool present, const char* what) {
    if (!present) fail("decode kernel: {}: expected a device pointer, found null", what);
  };
  require(args.q != nullptr && args.out != nullptr && args.step_pos != nullptr, "q, out, step_pos");
  require(args.k_new == nullptr ||
              (args.v_new != nullptr && args.victim_keys != nullptr && args.flags != nullptr),
          "v_new, victim_keys, flags");
  if (args.score != FusedScore::none) {
    require(args.protect != nullptr && args.victim_keys != nullptr, "protect, victim_keys");
    require(!score_uses_norm(args.score) || args.value_l1 != nullptr, "value_l1");
    require(!score_accumulates(args.score) || args.accumulated != nullptr, "accumulated");
    require(!args.shared || (args.importance != nullptr && args.arrivals != nullptr), "importance, arrivals");
  }
  require(!shape_.fp8() || (args.k_scale != nullptr && args.v_scale != nullptr), "k_scale, v_scale");
  require(args.recent.divisor == 0 || args.recent_slots != nullptr, "recent_slots");
  require(split_softmax_floats() == 0 || (args.split_softmax != nullptr && args.split_output != nullptr &&
                                          args.split_barrier != nullptr),
          "split_softmax, split_output, split_barrier");

  LaunchShape shape;
  shape.n_blocks = plan_.n_splits;
  shape.n_rows = plan_.n_ctas / plan_.n_splits;
  shape.n_threads = plan_.n_threads;
  shape.smem_bytes = plan_.smem_bytes;
  shape.cluster = plan_.bulk ? plan_.n_splits : 1;
  shape.dependent = args.early_state && plan_.bulk;
  shape.cooperative = !plan_.bulk && plan_.n_splits > 1;  // splits wait for each other through memory
  launch_kernel(stream, {"decode_step", decode_bytes(shape_, args.budget, args.score, args.shared), log},
                shape, kernels_[args.shared], args);
}

}  // namespace kvlapse
