#include "tests/support/kernels/emulated_rkv.h"

#include <limits>

#include "core/base/error.h"
#include "tests/support/kernels/emulated_device.h"
// After the emulator, which stands for the device's operations.
#include "kernels/cuda/rkv_kernels.cuh"

namespace kvlapse {
namespace {

template <int kHeadDim, class Element>
void run(const RkvArgs& args, uint64_t seed) {
  const int bytes = rkv_smem_bytes(args, kHeadDim, device::RkvElement<Element>::kBytes);
  const bool both = args.phase == RkvPhase::both;
  for (const RkvPhase phase : {args.phase, RkvPhase::second}) {
    RkvArgs at = args;
    at.phase = phase;
    device::run_emulated(
        {args.n_items * args.row_blocks, args.block_threads, both ? args.row_blocks : 1, bytes, seed},
        [&](unsigned char* shared) { device::RkvRows<kHeadDim, Element>(at, shared).run(); });
    if (both) return;
  }
}

template <class Element>
void run_dim(const RkvArgs& args, int head_dim, uint64_t seed) {
  switch (head_dim) {
    case 32: return run<32, Element>(args, seed);
    case 64: return run<64, Element>(args, seed);
    case 128: return run<128, Element>(args, seed);
    default: fail("rkv emulator: head_dim: expected 32, 64 or 128, found {}", head_dim);
  }
}

}  // namespace

void run_rkv_emulated(RkvProblem& p, uint64_t seed) {
  RkvArgs args{};
  set_rkv_scalars(args, p.shape);
  set_rkv_blocks(args, p.shape, true, 1 << 20);
  if (seed % 2 == 0) args.phase = RkvPhase::first;
  if (seed % 3 == 0) args.block_threads = args.block_rows;
  const size_t ranks = static_cast<size_t>(args.n_items) * args.stride,
               units = static_cast<size_t>(args.n_items) * args.units;
  const float unset = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> importance(ranks, unset), projection(ranks, unset),
      partial(units * p.shape.head_dim, unset), softmax(units * p.shape.window * 2, unset);
  std::vector<uint64_t> forgiven(ranks, ~uint64_t{0});
  std::vector<uint32_t> arrivals(args.n_items, 0);
  // The kernels read rows in chunks of 16 bytes.
  const auto aligned = [](std::vector<std::byte>& bytes, std::vector<uint64_t>& storage) {
    storage.resize(bytes.size() / 8 + 4);
    auto at = (reinterpret_cast<uintptr_t>(storage.data()) + 15) / 16 * 16;
    std::memcpy(reinterpret_cast<void*>(at), bytes.data(), bytes.size());
    return reinterpret_cast<void*>(at);
  };
  std::vector<uint64_t> q, k, v, norms, logits;
  args.q = aligned(p.q, q);
  args.k = aligned(p.k, k);
  args.v = aligned(p.v, v);
  args.order = p.order.data();
  args.count = p.count.data();
  args.positions = p.positions.data();
  args.value_l1 = p.value_l1.data();
  args.evicted = p.evicted.data();
  args.scores = p.scores.data();
  std::vector<std::byte> unset_norms(ranks * 4, std::byte{0xff});  // NaN
  args.inverse_norm = static_cast<float*>(aligned(unset_norms, norms));
  std::vector<std::byte> unset_logits(ranks * 4 * ((args.window + 7) / 8 * 8), std::byte{0xff});
  args.logits = static_cast<float*>(aligned(unset_logits, logits));
  args.importance = importance.data();
  args.projection = projection.data();
  args.forgiven = forgiven.data();
  args.softmax = softmax.data();
  args.partial_sum = partial.data();
  args.arrivals = arrivals.data();
  if (p.shape.dtype == DType::f32)
    run_dim<device::F32>(args, p.shape.head_dim, seed);
  else if (p.shape.dtype == DType::f16)
    run_dim<device::F16>(args, p.shape.head_dim, seed);
  else
    run_dim<device::Bf16>(args, p.shape.head_dim, seed);
  std::memcpy(p.k.data(), args.k, p.k.size());
  std::memcpy(p.v.data(), args.v, p.v.size());
}

}  // namespace kvlapse
