#include "tests/support/gpu/gpu_rkv.h"

namespace kvlapse {

void run_rkv_gpu(RkvProblem& p) {
  const RkvCompaction compaction(p.shape);
  DeviceBuffer<std::byte> q(p.q), k(p.k), v(p.v);
  DeviceBuffer<int32_t> order(p.order), count(p.count), positions(p.positions), evicted(p.evicted);
  DeviceBuffer<float> value_l1(p.value_l1), scores(p.scores);
  RkvArgs args = compaction.arguments();
  args.q = q.data(), args.k = k.data(), args.v = v.data();
  args.order = order.data(), args.count = count.data(), args.positions = positions.data();
  args.evicted = evicted.data(), args.value_l1 = value_l1.data(), args.scores = scores.data();
  Stream stream;
  compaction.launch(stream.get(), args);
  stream.synchronize();
  p.k = k.download(), p.v = v.download();
  p.order = order.download(), p.count = count.download(), p.positions = positions.download();
  p.evicted = evicted.download(), p.value_l1 = value_l1.download(), p.scores = scores.download();
}

}  // namespace kvlapse
