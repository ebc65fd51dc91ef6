#include "tests/support/kernels/emulated_decode.h"

#include <algorithm>

#include "core/base/error.h"
#include "tests/support/kernels/decode_arguments.h"
#include "tests/support/kernels/emulated_device.h"
// After the emulator, which stands for the device's operations.
#include "kernels/cuda/decode_kernel.cuh"

namespace kvlapse {
namespace {

template <int kHeadDim, class Element, bool kBulk, bool kLeaveOneOut, bool kShares>
void run_kernel(const DecodeArgs<device::TensorMap>& args, const DecodePlan& plan, uint64_t seed) {
  device::EmulatedLaunch launch;
  launch.n_blocks = plan.n_ctas;
  launch.n_columns = plan.n_splits;
  launch.n_threads = plan.n_threads;
  launch.cluster = plan.bulk ? plan.n_splits : 1;
  launch.smem_bytes = plan.smem_bytes;
  launch.seed = seed;
  device::run_emulated(launch, [&](unsigned char* shared) {
    using Traits = device::DecodeTraits<kHeadDim, Element, kBulk, kLeaveOneOut, kShares>;
    device::DecodeCta<Traits, DecodeArgs<device::TensorMap>>(args, shared).run();
  });
}

template <int kHeadDim, class Element, bool kBulk>
void run(const DecodeArgs<device::TensorMap>& args, const DecodePlan& plan, uint64_t seed) {
  (args.score == FusedScore::leave_one_out ? run_kernel<kHeadDim, Element, kBulk, true, true>
   : args.shared                           ? run_kernel<kHeadDim, Element, kBulk, false, true>
                 : run_kernel<kHeadDim, Element, kBulk, false, false>)(args, plan, seed);
}

template <int kHeadDim>
void run_dim(const DecodeArgs<device::TensorMap>& args, DType dtype, const DecodePlan& plan, uint64_t seed) {
  if (dtype == DType::f8e4m3)
    plan.bulk ? run<kHeadDim, device::E4m3, true>(args, plan, seed)
              : run<kHeadDim, device::E4m3, false>(args, plan, seed);
  else if (dtype == DType::f16)
    plan.bulk ? run<kHeadDim, device::F16, true>(args, plan, seed)
              : run<kHeadDim, device::F16, false>(args, plan, seed);
  else
    plan.bulk ? run<kHeadDim, device::Bf16, true>(args, plan, seed)
              : run<kHeadDim, device::Bf16, false>(args, plan, seed);
}

}  // namespace

void run_decode_emulated(DecodeProblem& p, const DecodePlan& plan, uint64_t seed) {
  DecodeArgs<device::TensorMap> args{};
  set_decode_scalars(args, p, plan);
  const int items = p.shape.n_items(), D = p.shape.head_dim;
  const int element = static_cast<int>(dtype_bytes(p.shape.dtype)), box = std::min(D, 128 / element);
  args.k_map = {p.k.data(), D, p.shape.n_slots, items, box, element};
  args.v_map = {p.v.data(), D, p.shape.n_slots, items, box, element};
  // Copied in chunks of 16 bytes.
  std::vector<float> scales[2];
  const auto align = [](std::vector<float>& storage, const std::vector<float>& from) {
    storage.resize(from.size() + 4);
    auto* at = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(storage.data()) + 15) / 16 * 16);
    std::ranges::copy(from, at);
    return at;
  };
  args.k_scale = align(scales[0], p.k_scale);
  args.v_scale = align(scales[1], p.v_scale);
  args.q = p.q.data();
  args.k_new = p.appends ? p.k_new.data() : nullptr;
  args.v_new = p.appends ? p.v_new.data() : nullptr;
  args.k = p.k.data();
  args.v = p.v.data();
  args.out = p.out.data();
  args.value_l1 = p.value_l1.data();
  args.accumulated = p.accumulated.data();
  args.importance = p.writes_importance ? p.importance.data() : nullptr;
  args.protect = p.protect.data();
  args.recent_slots = p.recent_slots.data();
  args.positions = p.positions.data();
  args.count = p.count.empty() ? nullptr : p.count.data();
  args.step_pos = p.step_pos.data();
  args.victim_keys = p.victim_keys.data();
  args.arrivals = p.arrivals.data();
  args.flags = p.flags.data();
  std::vector<float> softmax(static_cast<size_t>(items) * kMaxDecodeSplits * 16 + 4);
  std::vector<float> output(
      static_cast<size_t>(items) * plan.n_splits * p.shape.group() * D * (p.shape.leave_one_out ? 2 : 1) + 4);
  std::vector<uint32_t> barrier(items, 0);
  auto aligned = [](std::vector<float>& v) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(v.data()) + 15) / 16 * 16);
  };
  args.split_softmax = aligned(softmax);
  args.split_output = aligned(output);
  args.split_barrier = barrier.data();
  switch (D) {
    case 32: run_dim<32>(args, p.shape.dtype, plan, seed); break;
    case 64: run_dim<64>(args, p.shape.dtype, plan, seed); break;
    case 128: run_dim<128>(args, p.shape.dtype, plan, seed); break;
    case 256: run_dim<256>(args, p.shape.dtype, plan, seed); break;
    default: fail("decode emulator: head_dim: expected 32, 64, 128 or 256, found {}", D);
  }
  std::copy_n(args.k_scale, p.k_scale.size(), p.k_scale.begin());
  std::copy_n(args.v_scale, p.v_scale.size(), p.v_scale.begin());
}

}  // namespace kvlapse
