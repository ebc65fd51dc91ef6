#include "tests/support/kernels/emulated_rkv.h"

#include "core/base/error.h"
#include "tests/support/kernels/emulated_device.h"
// After the emulator, which stands for the device's operations.
#include "kernels/cuda/rkv_kernels.cuh"

namespace kvlapse {
namespace {

template <int kHeadDim, class Element>
void run(RkvArgs args, uint64_t seed) {
  args.layout = rkv_layout(args, kHeadDim, device::RkvElement<Element>::kBytes);
  const device::EmulatedLaunch launch{args.n_items * args.blocks, kRkvThreads, args.blocks, args.layout.bytes,
                                      seed};
  device::run_emulated(
      launch, [&](unsigned char* shared) { device::RkvHead<kHeadDim, Element>(args, shared).run(); });
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
  args.key_rows = static_cast<int>(16 + seed % 4 * 80);
  args.logit_tiles = static_cast<int>(seed * 7 % 30);
  std::vector<float> softmax(static_cast<size_t>(args.n_items) * p.shape.tiles() * p.shape.window * 2);
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
  args.softmax = softmax.data();
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
