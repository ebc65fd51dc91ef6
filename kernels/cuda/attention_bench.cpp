#include "kernels/cuda/attention_bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <span>
#include <utility>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "kernels/cuda/bench_kernels.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/device_memory.h"

namespace kvlapse {
namespace {

constexpr uint64_t kRotationBytes = 1ull << 30;  // K and V of one replay: far more than any L2
constexpr int kMinSlabs = 4, kMinRuns = 7, kMaxRuns = 40;

struct Variant {
  const char* name;
  FusedScore score;
  bool shared, overlapped;
  DecodePath path;
  DecodeTuning tuning = {};
};

// N independent layers whose K and V lie in one pool of random data.
class Layers {
 public:
  Layers(const DecodeShape& shape, const Variant& variant, unsigned char* pool, int n, const Stream& stream)
      : kernel_(shape, variant.path, variant.tuning),
        n_(n),
        q_(static_cast<size_t>(shape.batch) * shape.n_q_heads * shape.head_dim),
        new_rows_(2 * static_cast<size_t>(shape.n_items()) * shape.head_dim),
        out_(q_.size()),
        value_l1_(static_cast<size_t>(n) * slots(shape)),
        scales_(shape.fp8() ? 2 * static_cast<size_t>(n) * shape.n_items() * shape.scale_stride() : 0),
        importance_(slots(shape)),
        split_softmax_(kernel_.split_softmax_floats()),
        split_output_(kernel_.split_output_floats()),
        protect_(static_cast<size_t>(n) * shape.n_items() * ((shape.n_slots + 63) / 64 * 4)),
        recent_(static_cast<size_t>(n) * shape.n_items()),
        step_pos_(std::vector<int32_t>(shape.batch, 1 << 20)),
        keys_(first_victims(shape, n)),
        arrivals_(static_cast<size_t>(shape.batch) * kMaxDecodeSplits),
        flags_(1),
        barrier_(static_cast<size_t>(shape.n_items())) {
    launch_fill_random(stream.get(), q_.data(), q_.size(), shape.io(), 11);
    launch_fill_random(stream.get(), new_rows_.data(), new_rows_.size(), shape.io(), 12);
    if (shape.fp8()) launch_fill_uniform(stream.get(), scales_.data(), scales_.size(), 0.008f, 0.012f, 14);
    launch_fill_uniform(stream.get(), value_l1_.data(), value_l1_.size(), 60, 140, 13);
    stream.synchronize();
    protect_.fill_bytes(0);
    recent_.fill_bytes(0);
    arrivals_.fill_bytes(0);
    flags_.fill_bytes(0);
    barrier_.fill_bytes(0);
    const uint64_t plane = shape.kv_bytes(shape.n_slots) / 2;
    for (int i = 0; i < n; ++i) {
      unsigned char* k = pool + 2 * plane * static_cast<uint64_t>(i);
      CudaDecodeArgs args = kernel_.arguments(k, k + plane, variant.score, variant.shared);
      args.q = q_.data();
      args.k_new = new_rows_.data();
      args.v_new = new_rows_.data() + new_rows_.size() / 2;
      args.out = out_.data();
      args.value_l1 = value_l1_.data() + static_cast<size_t>(i) * slots(shape);
      if (shape.fp8()) {
        args.k_scale = scales_.data() + scales_.size() / n * i;
        args.v_scale = args.k_scale + scales_.size() / n / 2;
      }
      args.importance = variant.shared ? importance_.data() : nullptr;
      args.protect = protect_.data() + protect_.size() / n * i;
      args.recent_slots = recent_.data() + recent_.size() / n * i;
      args.step_pos = step_pos_.data();
      args.victim_keys = keys_.data() + keys_.size() / n * i;
      args.arrivals = arrivals_.data();
      args.flags = flags_.data();
      args.split_softmax = split_softmax_.data();
      args.split_output = split_output_.data();
      args.split_barrier = barrier_.data();
      args.recent = divisor_of(variant.score == FusedScore::none ? 0 : 1);
      args.early_state = variant.overlapped;
      args_.push_back(args);
    }
  }

  void launch(const Stream& stream) const {
    for (const CudaDecodeArgs& args : args_) kernel_.launch(stream.get(), args);
  }
  const DecodePlan& plan() const { return kernel_.plan(); }
  bool found_no_candidate() const { return flags_.download()[0] != 0; }

 private:
  static size_t slots(const DecodeShape& s) { return static_cast<size_t>(s.n_items()) * s.n_slots; }
  static std::vector<uint64_t> first_victims(const DecodeShape& s, int n) {
    std::vector<uint64_t> keys(static_cast<size_t>(n) * s.n_items() * kMaxDecodeSplits, ~uint64_t{0});
    for (size_t i = 0; i < keys.size(); i += kMaxDecodeSplits)
      keys[i] = counter_random({i / kMaxDecodeSplits}) % static_cast<uint64_t>(s.n_slots);
    return keys;
  }

  DecodeKernel kernel_;
  int n_;
  DeviceBuffer<uint16_t> q_, new_rows_, out_;
  DeviceBuffer<float> value_l1_, scales_, importance_, split_softmax_, split_output_;
  DeviceBuffer<uint16_t> protect_;
  DeviceBuffer<int32_t> recent_, step_pos_;
  DeviceBuffer<uint64_t> keys_;
  DeviceBuffer<uint32_t> arrivals_, flags_, barrier_;
  std::vector<CudaDecodeArgs> args_;
};

// Microseconds of each replay.
std::vector<double> time_replays(const Stream& stream, const Graph& graph, double seconds) {
  graph.launch(stream);
  Event start, stop;
  std::vector<double> us;
  double total = 0;
  while (static_cast<int>(us.size()) < kMinRuns ||
         (total < seconds * 1e6 && static_cast<int>(us.size()) < kMaxRuns)) {
    start.record(stream);
    graph.launch(stream);
    stop.record(stream);
    us.push_back(stop.ms_since(start) * 1e3);
    total += us.back();
  }
  std::sort(us.begin(), us.end());
  return us;
}

int slabs_of(uint64_t kv_bytes) {
  return static_cast<int>(std::max<uint64_t>(kMinSlabs, (kRotationBytes + kv_bytes - 1) / kv_bytes));
}

}  // namespace

double measure_read_ceiling_gbps() {
  const uint64_t bytes = 4ull << 30;
  const int blocks = device_attribute(cudaDevAttrMultiProcessorCount);
  DeviceBuffer<unsigned char> data(bytes);
  Stream stream;
  launch_fill_random(stream.get(), data.data(), bytes / 2, DType::bf16, 1);
  stream.synchronize();
  double best_us = 1e30;
  auto measure = [&](auto launch) {
    Event start, stop;
    for (int i = 0; i < 8; ++i) {
      start.record(stream);
      launch();
      stop.record(stream);
      const double us = stop.ms_since(start) * 1e3;
      if (i > 1) best_us = std::min(best_us, us);
    }
  };
  measure([&] { launch_read_plain(stream.get(), data.data(), bytes, blocks * 4, nullptr); });
  for (auto [per_sm, stages] : {std::pair{1, 12}, {1, 8}, {2, 6}})
    if (launch_read_bulk(stream.get(), data.data(), 1 << 20, blocks, stages))
      measure([&, n = per_sm, depth = stages] {
        launch_read_bulk(stream.get(), data.data(), bytes, blocks * n, depth);
      });
  return static_cast<double>(bytes) / best_us * 1e-3;
}

namespace {

constexpr Variant kVariants[] = {
    {"victim_per_head", FusedScore::contribution, false, true, DecodePath::best},
    {"victim_shared", FusedScore::contribution, true, true, DecodePath::best},
    {"attention_only", FusedScore::none, false, true, DecodePath::best},
    {"victim_per_head_no_overlap", FusedScore::contribution, false, false, DecodePath::best},
    {"victim_per_head_cp_async", FusedScore::contribution, false, false, DecodePath::cp_async},
};

constexpr Variant kLeaveOneOutVariants[] = {
    {"leave_one_out", FusedScore::leave_one_out, false, true, DecodePath::best},
    {"leave_one_out_shared", FusedScore::leave_one_out, true, true, DecodePath::best},
    kVariants[0],
    {"leave_one_out_cp_async", FusedScore::leave_one_out, false, false, DecodePath::cp_async},
};

// Sequences and slots that a table has.
constexpr std::pair<int, int> kShapes[] = {{1, 1024},  {1, 3276},   {1, 16384}, {8, 1024},  {8, 3276},
                                           {8, 16384}, {16, 3276},  {32, 1024}, {32, 3276}, {32, 16384},
                                           {64, 1024}, {128, 1024}, {128, 3276}};

std::vector<AttentionBenchCase> standard_cases(const AttentionBenchOptions& options) {
  std::vector<AttentionBenchCase> cases;
  for (DType dtype : options.fp8 ? std::vector<DType>{DType::f8e4m3, DType::bf16}
                                 : std::vector<DType>{DType::bf16, DType::f16})
    for (auto [batch, slots] : kShapes)
      if (batch >= options.min_batch && batch <= options.max_batch) cases.push_back({batch, slots, dtype});
  return cases;
}

struct Work {
  AttentionBenchCase at;
  Variant variant;
};

std::vector<Work> sweep_work() {
  std::vector<Work> work;
  auto add = [&](int batch, int slots, DecodeTuning tuning) {
    Variant v = kVariants[0];
    v.tuning = tuning;
    work.push_back({{batch, slots, DType::bf16}, v});
  };
  for (DType dtype : {DType::bf16, DType::f8e4m3})
    for (int groups : {2, 3, 4, 5})
      for (auto [batch, slots] : kShapes) {
        add(batch, slots, {.groups = groups});
        work.back().at.dtype = dtype;
      }
  // Two blocks a multiprocessor: a launch's first loads overlap the end of the one before.
  for (int blocks : {1, 2}) {
    for (int splits : {4, 5, 6, 7, 8, 9})
      add(1, 1024, {.splits = splits, .blocks_per_multiprocessor = blocks});
    for (int splits : {6, 7, 8, 9, 10}) add(1, 3276, {.splits = splits, .blocks_per_multiprocessor = blocks});
    for (int splits : {1, 2, 3}) {
      add(8, 1024, {.splits = splits, .blocks_per_multiprocessor = blocks});
      add(8, 3276, {.splits = splits, .blocks_per_multiprocessor = blocks});
    }
    for (int batch : {16, 32, 64, 128}) add(batch, 1024, {.splits = 1, .blocks_per_multiprocessor = blocks});
    for (int batch : {16, 32, 128}) add(batch, 3276, {.splits = blocks, .blocks_per_multiprocessor = blocks});
  }
  for (ReadAhead ahead : {ReadAhead::no, ReadAhead::yes})
    for (auto [batch, slots] : {std::pair{64, 1024}, {128, 1024}, {32, 3276}, {128, 3276}})
      add(batch, slots, {.ahead = ahead});
  for (int blocks : {1, 2}) {  // a victim that the layer shares
    add(1, 1024, {.blocks_per_multiprocessor = blocks});
    work.back().variant = kVariants[1];
    work.back().variant.tuning = {.blocks_per_multiprocessor = blocks};
  }
  for (int blocks : {1, 2})
    for (int splits : {6, 8, 9, 10, 12, 14, 16})
      add(1, 16384, {.splits = splits, .blocks_per_multiprocessor = blocks});
  for (int splits : {2, 3, 4}) add(8, 16384, {.splits = splits});
  return work;
}

}  // namespace

void bench_attention(const AttentionBenchOptions& options,
                     const std::function<void(const AttentionBenchRow&)>& done) {
  std::vector<Work> work;
  if (options.sweep) work = sweep_work();
  // Variant by variant: a table with a column missing is worth more than one with rows missing.
  else
    for (const Variant& variant : options.leave_one_out ? std::span<const Variant>(kLeaveOneOutVariants)
                                                        : std::span<const Variant>(kVariants))
      for (const AttentionBenchCase& c : !variant.overlapped && options.overlapped_only
                                             ? std::vector<AttentionBenchCase>()
                                         : options.cases.empty() ? standard_cases(options)
                                                                 : options.cases) {
        // Of bf16, which fp8 is set beside, the step with a victim a head alone.
        if (options.fp8 && c.dtype != DType::f8e4m3 && variant.name != kVariants[0].name) continue;
        work.push_back({c, variant});
      }

  AttentionBenchRow row;
  row.device = current_gpu_name();
  row.n_q_heads = options.n_q_heads, row.n_kv_heads = options.n_kv_heads, row.head_dim = options.head_dim;
  row.read_ceiling_gbps = measure_read_ceiling_gbps();
  auto shape_of = [&](const AttentionBenchCase& c) {
    return DecodeShape{c.batch, options.n_q_heads, options.n_kv_heads, options.head_dim, c.slots, c.dtype};
  };
  uint64_t pool_bytes = 0;
  for (const Work& w : work) {
    const uint64_t bytes = shape_of(w.at).kv_bytes(w.at.slots);
    pool_bytes = std::max(pool_bytes, bytes * slabs_of(bytes));
  }
  DeviceBuffer<unsigned char> pool(pool_bytes);
  Stream stream;
  DType filled = DType::f32;
  for (const Work& w : work) {
    DecodeShape shape = shape_of(w.at);
    shape.leave_one_out = w.variant.score == FusedScore::leave_one_out;
    if (filled != w.at.dtype) {
      if (shape.fp8())
        launch_fill_fp8(stream.get(), pool.data(), pool_bytes, 1);
      else
        launch_fill_random(stream.get(), pool.data(), pool_bytes / 2, w.at.dtype, 1);
    }
    stream.synchronize();
    filled = w.at.dtype;
    row.at = w.at;
    row.kv_bytes = shape.kv_bytes(w.at.slots);
    const int n = slabs_of(row.kv_bytes);
    try {
      // K and V are worn by the rows that earlier work wrote: still random.
      const Layers layers(shape, w.variant, pool.data(), n, stream);
      const Graph graph(stream, [&] { layers.launch(stream); });
      const std::vector<double> us = time_replays(stream, graph, options.seconds_per_case);
      if (layers.found_no_candidate()) fail("a step found no slot to take");
      row.variant = w.variant.name;
      row.n_splits = layers.plan().n_splits, row.n_stages = layers.plan().n_stages,
      row.n_ctas = layers.plan().n_ctas, row.n_groups = layers.plan().n_groups,
      row.state_ahead = layers.plan().state_ahead;
      row.counted_bytes = decode_bytes(shape, w.at.slots, w.variant.score, w.variant.shared);
      row.median_us = us[us.size() / 2] / n, row.min_us = us.front() / n, row.max_us = us.back() / n;
      row.runs = static_cast<int>(us.size());
      row.with_importance = row.with_eviction = w.variant.score != FusedScore::none;
    } catch (const Error& e) {
      std::fprintf(stderr, "bench attention: %s B %d S %d: %s\n", w.variant.name, w.at.batch, w.at.slots,
                   e.what());
      continue;
    }
    done(row);
  }
}

std::string attention_bench_json(const AttentionBenchRow& r) {
  return fmt::format(
      R"({{"bench":"attention","case":"{} B{} S{} {}","device":"{}","variant":"{}","dtype":"{}","batch":{},"slots":{},)"
      R"("q_heads":{},"kv_heads":{},"head_dim":{},"splits":{},"stages":{},"ctas":{},"groups":{},"state_ahead":{},"kv_bytes":{},"counted_bytes":{},"median_us":{:.3f},)"
      R"("floor_us":{:.3f},"read_ceiling_gbps":{:.1f},"share_of_ceiling":{:.4f},"with_importance":{},)"
      R"("with_eviction":{},"median":{:.3f},"unit":"us","limit":{:.3f},"ratio_to_limit":{:.4f},"runs":{},"spread":{:.4f}}})",
      r.variant, r.at.batch, r.at.slots, dtype_name(r.at.dtype), r.device, r.variant, dtype_name(r.at.dtype),
      r.at.batch, r.at.slots, r.n_q_heads, r.n_kv_heads, r.head_dim, r.n_splits, r.n_stages, r.n_ctas,
      r.n_groups, r.state_ahead, r.kv_bytes, r.counted_bytes, r.median_us, r.floor_us(), r.read_ceiling_gbps,
      r.floor_us() / r.median_us, r.with_importance, r.with_eviction, r.median_us, r.floor_us(),
      r.median_us / r.floor_us(), r.runs, (r.max_us - r.min_us) / r.median_us);
}

}  // namespace kvlapse
