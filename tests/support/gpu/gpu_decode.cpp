#include "tests/support/gpu/gpu_decode.h"

#include "tests/support/kernels/decode_arguments.h"

namespace kvlapse {

bool gpu_present() {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess && n > 0;
}

GpuDecode::GpuDecode(const DecodeKernel& kernel, const DecodeProblem& p)
    : kernel_(kernel),
      q_(p.q),
      k_new_(p.k_new),
      v_new_(p.v_new),
      k_(p.k),
      v_(p.v),
      out_(p.out),
      k_scale_(p.k_scale),
      v_scale_(p.v_scale),
      value_l1_(p.value_l1),
      accumulated_(p.accumulated),
      importance_(p.importance),
      split_softmax_(kernel.split_softmax_floats()),
      split_output_(kernel.split_output_floats()),
      protect_(p.protect),
      recent_slots_(p.recent_slots),
      positions_(p.positions),
      count_(p.count),
      step_pos_(p.step_pos),
      victim_keys_(p.victim_keys),
      arrivals_(p.arrivals),
      flags_(p.flags),
      split_barrier_(static_cast<size_t>(p.shape.n_items())),
      args_(kernel.arguments(k_.data(), v_.data(), p.score, p.shared)) {
  split_barrier_.fill_bytes(0);
  set_decode_scalars(args_, p, kernel.plan());
  args_.q = q_.data();
  args_.k_new = p.appends ? k_new_.data() : nullptr;
  args_.v_new = p.appends ? v_new_.data() : nullptr;
  args_.out = out_.data();
  args_.k_scale = k_scale_.data();
  args_.v_scale = v_scale_.data();
  args_.value_l1 = value_l1_.data();
  args_.accumulated = accumulated_.data();
  args_.importance = p.writes_importance || p.shared ? importance_.data() : nullptr;
  args_.protect = protect_.data();
  args_.recent_slots = recent_slots_.data();
  args_.positions = positions_.data();
  args_.count = count_.data();
  args_.step_pos = step_pos_.data();
  args_.victim_keys = victim_keys_.data();
  args_.arrivals = arrivals_.data();
  args_.flags = flags_.data();
  args_.split_softmax = split_softmax_.data();
  args_.split_output = split_output_.data();
  args_.split_barrier = split_barrier_.data();
}

void GpuDecode::launch(cudaStream_t stream, bool early_state, LaunchLog* log) const {
  CudaDecodeArgs args = args_;
  args.early_state = early_state;
  kernel_.launch(stream, args, log);
}

void GpuDecode::upload_token(const DecodeProblem& p) {
  q_.upload(p.q);
  k_new_.upload(p.k_new);
  v_new_.upload(p.v_new);
}

void GpuDecode::download(DecodeProblem& p) const {
  KVLAPSE_CUDA_CHECK(cudaDeviceSynchronize());
  p.k = k_.download();
  p.v = v_.download();
  p.out = out_.download();
  p.k_scale = k_scale_.download();
  p.v_scale = v_scale_.download();
  p.value_l1 = value_l1_.download();
  p.accumulated = accumulated_.download();
  p.importance = importance_.download();
  p.protect = protect_.download();
  p.recent_slots = recent_slots_.download();
  p.positions = positions_.download();
  p.count = count_.download();
  p.step_pos = step_pos_.download();
  p.victim_keys = victim_keys_.download();
  p.arrivals = arrivals_.download();
  p.flags = flags_.download();
}

}  // namespace kvlapse
