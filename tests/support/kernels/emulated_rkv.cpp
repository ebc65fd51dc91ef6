#include "tests/support/kernels/emulated_rkv.h"

#include "core/base/error.h"
#include "tests/support/kernels/emulated_device.h"
// After the emulator, which stands for the device's operations.
#include "kernels/cuda/rkv_kernels.cuh"

namespace kvlapse {
namespace {

template <int kHeadDim, class Element>
void run(const RkvArgs& args, uint64_t seed) {
  constexpr int kBytes = device::RkvElement<Element>::kBytes;
  const device::EmulatedLaunch rows{args.n_items * args.row_blocks, kRkvThreads, 1,
                                    rkv_rows_smem_bytes(kHeadDim, kBytes), seed};
  device::run_emulated(
      rows, [&](unsigned char* shared) { device::RkvRows<kHeadDim, Element>(args, shared).run(); });
  const device::EmulatedLaunch select{args.n_items, args.select_threads, 1,
                                      rkv_select_smem_bytes(args.n_slots, args.budget), seed};
  device::run_emulated(
      select, [&](unsigned char* shared) { device::RkvSelect<kHeadDim, Element>(args, shared).run(); });
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
  if (seed % 2 == 0) args.select_threads /= 2;
  const size_t slots = p.order.size();
  std::vector<float> inverse_norm(slots), own(slots), cosine(slots), logits(slots * p.shape.window),
      partial(static_cast<size_t>(args.n_items) * args.row_blocks * p.shape.head_dim);
  std::vector<float> softmax(static_cast<size_t>(args.n_items) * args.row_blocks * p.shape.window * 2);
  std::vector<int32_t> similar(slots);
  // The kernels read rows in chunks of 16 bytes.
  const auto aligned = [](std::vector<std::byte>& bytes, std::vector<uint64_t>& storage) {
    storage.resize(bytes.size() / 8 + 4);
    auto at = (reinterpret_cast<uintptr_t>(storage.data()) + 15) / 16 * 16;
    std::memcpy(reinterpret_cast<void*>(at), bytes.data(), bytes.size());
    return reinterpret_cast<void*>(at);
  };
  std::vector<uint64_t> q, k, v;
  args.q = aligned(p.q, q);
  args.k = aligned(p.k, k);
  args.v = aligned(p.v, v);
  args.order = p.order.data();
  args.count = p.count.data();
  args.positions = p.positions.data();
  args.value_l1 = p.value_l1.data();
  args.evicted = p.evicted.data();
  args.scores = p.scores.data();
  args.inverse_norm = inverse_norm.data();
  args.logits = logits.data();
  args.softmax = softmax.data();
  args.partial_sum = partial.data();
  args.own = own.data();
  args.similar = similar.data();
  args.cosine = cosine.data();
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
