#include "kernels/cuda/rkv_bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "kernels/cuda/attention_bench.h"
#include "kernels/cuda/bench_kernels.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/rkv.h"

namespace kvlapse {
namespace {

constexpr uint64_t kRotationBytes = 1ull << 30;
constexpr int kMaxLayers = 48, kRuns = 15;

// Layers with keys and order of their own; scratch is shared, as launches follow each other.
class Layers {
 public:
  Layers(const RkvShape& shape, bool alike, const Stream& stream) : compaction_(shape) {
    const uint64_t plane = static_cast<uint64_t>(shape.n_items()) * shape.n_slots * shape.head_dim;
    n_ = static_cast<int>(std::clamp<uint64_t>(kRotationBytes / (plane * 4), 4, kMaxLayers));
    const size_t slots = static_cast<size_t>(shape.n_items()) * shape.n_slots;
    q_ = DeviceBuffer<uint16_t>(static_cast<size_t>(shape.batch) * shape.window * shape.n_q_heads *
                                shape.head_dim);
    k_ = DeviceBuffer<uint16_t>(plane * n_), v_ = DeviceBuffer<uint16_t>(plane * n_);
    launch_fill_random(stream.get(), q_.data(), q_.size(), shape.dtype, 3);
    launch_fill_random(stream.get(), k_.data(), k_.size(), shape.dtype, 4, alike ? 1.5f : 0.0f);
    launch_fill_random(stream.get(), v_.data(), v_.size(), shape.dtype, 5);
    std::vector<int32_t> order(slots * n_);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i % shape.n_slots);
    order_ = DeviceBuffer<int32_t>(order), positions_ = DeviceBuffer<int32_t>(order);
    full_ =
        DeviceBuffer<int32_t>(std::vector<int32_t>(static_cast<size_t>(shape.n_items()) * n_, shape.n_slots));
    count_ = DeviceBuffer<int32_t>(full_.size());
    value_l1_ = DeviceBuffer<float>(slots * n_);
    value_l1_.fill_bytes(0);
    for (int i = 0; i < n_; ++i) {
      RkvArgs args = compaction_.arguments();
      args.q = q_.data();
      args.k = k_.data() + plane * i, args.v = v_.data() + plane * i;
      args.order = order_.data() + slots * i, args.positions = positions_.data() + slots * i;
      args.value_l1 = value_l1_.data() + slots * i;
      args.count = count_.data() + static_cast<size_t>(shape.n_items()) * i;
      args_.push_back(args);
    }
    stream.synchronize();
  }
  int size() const { return n_; }
  int blocks() const { return args_[0].blocks; }
  // All tokens are held again, in whatever order they lie.
  void refill(const Stream& stream) const {
    KVLAPSE_CUDA_CHECK(
        cudaMemcpyAsync(count_.data(), full_.data(), full_.bytes(), cudaMemcpyDeviceToDevice, stream.get()));
  }
  void launch(const Stream& stream) const {
    for (const RkvArgs& args : args_) compaction_.launch(stream.get(), args);
  }

 private:
  RkvCompaction compaction_;
  int n_ = 0;
  DeviceBuffer<uint16_t> q_, k_, v_;
  DeviceBuffer<int32_t> order_, positions_, full_, count_;
  DeviceBuffer<float> value_l1_;
  std::vector<RkvArgs> args_;
};

std::vector<RkvBenchCase> standard_cases() {
  std::vector<RkvBenchCase> cases;
  for (bool alike : {false, true})
    for (auto [batch, budget] : {std::pair{1, 1024}, {1, 2048}, {1, 3276}, {8, 1024}, {64, 1024}, {64, 3276}})
      cases.push_back({batch, budget, 128, alike, DType::bf16, 0});
  return cases;
}

}  // namespace

void bench_rkv(const std::vector<RkvBenchCase>& cases, double read_ceiling_gbps,
               const std::function<void(const RkvBenchRow&)>& done) {
  RkvBenchRow row;
  row.device = current_gpu_name();
  row.n_q_heads = 32, row.n_kv_heads = 8, row.head_dim = 128;
  row.read_ceiling_gbps = read_ceiling_gbps > 0 ? read_ceiling_gbps : measure_read_ceiling_gbps();
  for (const RkvBenchCase& at : cases.empty() ? standard_cases() : cases) {
    RkvShape shape{at.batch, row.n_q_heads, row.n_kv_heads, row.head_dim, at.budget + at.buffer,
                   at.dtype, at.budget};
    shape.blocks = at.blocks;
    Stream stream;
    const Layers layers(shape, at.alike, stream);
    const Graph graph(stream, [&] { layers.launch(stream); });
    std::vector<double> us;
    Event start, stop;
    for (int run = 0; run < kRuns + 2; ++run) {
      layers.refill(stream);
      start.record(stream);
      graph.launch(stream);
      stop.record(stream);
      const double time = stop.ms_since(start) * 1e3 / layers.size();
      if (run >= 2) us.push_back(time);
    }
    std::sort(us.begin(), us.end());
    row.at = at;
    row.blocks = layers.blocks();
    row.key_bytes =
        static_cast<uint64_t>(shape.n_items()) * shape.n_slots * shape.head_dim * dtype_bytes(at.dtype);
    row.counted_bytes = rkv_bytes(shape, shape.n_slots);
    row.median_us = us[us.size() / 2], row.min_us = us.front(), row.max_us = us.back();
    row.runs = static_cast<int>(us.size());
    done(row);
  }
}

std::string rkv_bench_json(const RkvBenchRow& r) {
  return fmt::format(
      R"({{"bench":"rkv","case":"B{} budget {} + {} {} {}","device":"{}","dtype":"{}","batch":{},"budget_slots":{},)"
      R"("slots":{},"blocks":{},"q_heads":{},"kv_heads":{},"head_dim":{},"keys_alike":{},"key_bytes":{},"counted_bytes":{},)"
      R"("read_ceiling_gbps":{:.1f},"median":{:.3f},"unit":"us","limit":{:.3f},"ratio_to_limit":{:.4f},"runs":{},"spread":{:.4f}}})",
      r.at.batch, r.at.budget, r.at.buffer, dtype_name(r.at.dtype), r.at.alike ? "alike" : "unlike", r.device,
      dtype_name(r.at.dtype), r.at.batch, r.at.budget, r.at.budget + r.at.buffer, r.blocks, r.n_q_heads,
      r.n_kv_heads, r.head_dim, r.at.alike, r.key_bytes, r.counted_bytes, r.read_ceiling_gbps, r.median_us,
      r.floor_us(), r.median_us / r.floor_us(), r.runs, (r.max_us - r.min_us) / r.median_us);
}

}  // namespace kvlapse
