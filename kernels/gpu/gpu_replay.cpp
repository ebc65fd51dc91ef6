#include "kernels/gpu/gpu_replay.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/base/row_math.h"

namespace kvlapse {
namespace {

namespace gr = gpu_replay;
using Clock = std::chrono::steady_clock;

constexpr int kMostBlockSteps = 512;
// Queues, and marks of the blocks in flight: by the block's number modulo two, or three.
constexpr int kDecisions = 0, kMeasures = 1, kCopies = 2;
constexpr int kDecided = 0, kReady = 2, kLoaded = 3, kMeasured = 6, kWeighed = 9;

gr::Reduce reduce_of(GqaRule rule) {
  return rule == GqaRule::mean ? gr::Reduce::mean : rule == GqaRule::max ? gr::Reduce::max : gr::Reduce::sum;
}

}  // namespace

// One run.
struct GpuReplay::Run {
  GpuReplay& owner;
  DeviceApi& api;
  DeviceReplay& r;
  gr::Shape shape;
  DeviceApi::Limits limits;
  int n_blocks = 0;
  int n_configs, begin, end, block_steps;  // steps [begin, end) are measured, or decide when nothing is
  size_t row_floats;                       // weights of a step
  float *q_host, *k_host, *v_host, *q[3], *k, *v, *weights[2], *peaks, *l1;
  float *metrics = nullptr, *future = nullptr;
  uint16_t *half, *half_weights[2] = {};
  float *outputs = nullptr, *totals = nullptr;
  gr::Repair* repairs = nullptr;
  uint32_t* n_repairs = nullptr;
  int32_t* most_held = nullptr;
  int32_t *last, *failed;
  gr::RowFacts* facts[2] = {};
  float *older = nullptr, *entropy = nullptr, *cosine = nullptr;
  int32_t* last_hot = nullptr;

  // Tasks of one launch: neighbours in the array.
  struct Group {
    int first = 0, n = 0, cluster = 1, smem = 0, slots = 0;
    bool large = false;
  };
  std::vector<gr::DecideTask> tasks;
  std::vector<int> task_configs;
  std::vector<Group> groups;
  gr::DecideTask* device_tasks = nullptr;
  bool any_sums = false;
  Clock::time_point stage_start;

  Run(GpuReplay& gpu, DeviceReplay& replay) : owner(gpu), api(*gpu.api_), r(replay) {
    const CacheGeometry& g = r.geometry;
    shape = {g.n_q_heads, g.n_kv_heads, g.head_dim, r.n_tokens, (r.n_tokens + 63) / 64 * 64};
    limits = api.limits();
    n_configs = static_cast<int>(r.configs.size());
    begin = std::max(r.step_begin, r.n_prompt);
    end = std::min(r.step_end, r.n_tokens);
    row_floats = static_cast<size_t>(shape.n_kv) * shape.stride * shape.lanes();
    block_steps =
        static_cast<int>(std::clamp<size_t>(owner.block_bytes_ / (row_floats * 4), 32, kMostBlockSteps)) /
        32 * 32;
    block_steps = std::min(block_steps, (end + 31) / 32 * 32);
    if (shape.group() > gr::kMaxGroup || shape.dim > gr::kMaxDim)
      fail(
          "replay on {}: expected at most {} query heads per kv head of at most {} components, found {} of "
          "{}",
          api.describe(), gr::kMaxGroup, gr::kMaxDim, shape.group(), shape.dim);
  }

  template <class T>
  T* on_device(const char* name, size_t n) {
    return static_cast<T*>(owner.device(name, n * sizeof(T)));
  }
  // What is at `from` when the device is done, in host memory of that name.
  template <class T>
  std::span<const T> answer(const char* name, const T* from, size_t n) {
    auto* to = static_cast<T*>(owner.host(name, n * sizeof(T)));
    api.download_later(to, from, n * sizeof(T));
    return {to, n};
  }
  void stage(const char* name) {
    if (!r.time_stages) return;
    api.synchronize();
    const auto now = Clock::now();
    const double took = std::chrono::duration<double>(now - stage_start).count();
    stage_start = now;
    for (auto& [known, seconds] : r.stages)
      if (known == name) {
        seconds += took;
        return;
      }
    r.stages.emplace_back(name, took);
  }

  void allocate() {
    const auto n_tokens = static_cast<size_t>(r.n_tokens);
    const size_t q_width = static_cast<size_t>(shape.n_q) * shape.dim,
                 kv_width = static_cast<size_t>(shape.n_kv) * shape.dim,
                 heads = static_cast<size_t>(n_configs) * shape.n_kv,
                 q_heads = static_cast<size_t>(n_configs) * shape.n_q;
    q_host = static_cast<float*>(owner.host("q", n_tokens * q_width * 4));
    k_host = static_cast<float*>(owner.host("k", n_tokens * kv_width * 4));
    v_host = static_cast<float*>(owner.host("v", n_tokens * kv_width * 4));
    for (int i = 0; i < 3; ++i)
      q[i] = on_device<float>(std::array{"q 0", "q 1", "q 2"}[i],
                              static_cast<size_t>(block_steps + 1) * q_width);
    for (int i = 0; i < 2; ++i)
      weights[i] =
          on_device<float>(i ? "weights 1" : "weights 0", static_cast<size_t>(block_steps) * row_floats);
    peaks = on_device<float>("peaks", static_cast<size_t>(block_steps) * row_floats / gr::kRun);
    k = on_device<float>("k", n_tokens * kv_width);
    v = on_device<float>("v", n_tokens * kv_width);
    half = on_device<uint16_t>("half", n_tokens * shape.n_kv * shape.dim_padded());
    l1 = on_device<float>("l1", n_tokens * shape.n_kv);
    last = on_device<int32_t>("last", heads * n_tokens);
    failed = on_device<int32_t>("failed", 2);  // a step, a token: plus one
    api.fill(last, 0x7f, heads * n_tokens * 4);
    api.fill(failed, 0, 8);
    if (!r.metrics) return;
    metrics = on_device<float>("metrics", gr::kMetricKinds * q_heads * n_tokens);
    future = on_device<float>("future", heads * n_tokens);
    for (int i = 0; i < 2; ++i) {
      facts[i] =
          on_device<gr::RowFacts>(i ? "facts 1" : "facts 0", static_cast<size_t>(block_steps) * shape.n_q);
      half_weights[i] = on_device<uint16_t>(i ? "half_weights 1" : "half_weights 0",
                                            static_cast<size_t>(block_steps) * row_floats);
    }
    outputs = on_device<float>("outputs", static_cast<size_t>(block_steps) * shape.n_q * shape.dim_padded());
    totals = on_device<float>("totals", static_cast<size_t>(block_steps) * shape.n_q);
    repairs = on_device<gr::Repair>("repairs", q_heads * block_steps);
    n_repairs = on_device<uint32_t>("n_repairs", 1);
    most_held = on_device<int32_t>("held", n_configs);
    std::vector<int32_t> most_slots;
    for (const DeviceReplayConfig& c : r.configs) most_slots.push_back(c.rule.peak_slots(c.budget));
    api.upload(most_held, most_slots.data(), most_slots.size() * 4);
    older = on_device<float>("older", n_tokens * shape.n_kv * gr::kHorizon);
    entropy = on_device<float>("entropy", n_tokens * shape.n_q);
    cosine = on_device<float>("cosine", n_tokens * shape.n_q);
    last_hot = on_device<int32_t>("last_hot", n_tokens * shape.n_kv);
    api.fill(future, 0, heads * n_tokens * 4);
    api.fill(last_hot, 0xff, n_tokens * shape.n_kv * 4);
  }

  // Where older tokens go first the whole answer is known.
  void decide_by_position(int config) {
    const DeviceReplayConfig& c = r.configs[config];
    const EvictionRule& rule = c.rule;
    const int target = c.budget - rule.headroom, trigger = target + rule.slack,
              recent = std::min(rule.recent_slots(c.budget), target),
              first_free = std::max(rule.sinks, rule.pin_prompt ? r.n_prompt : 0);
    std::vector<int32_t> gone(static_cast<size_t>(r.n_tokens) * shape.n_kv, gr::kHeld);
    for (int h = 0; h < shape.n_kv; ++h) {
      int32_t* own = gone.data() + static_cast<size_t>(h) * r.n_tokens;
      int held = drop_prompt(c, h, own), oldest = first_free;
      for (int step = r.n_prompt; step < end; ++step) {
        if (++held <= trigger) continue;
        while (oldest <= step && own[oldest] != gr::kHeld) ++oldest;
        if (oldest > step - recent) fail_step(step, config);
        own[oldest] = step;
        --held;
      }
    }
    api.upload(last + static_cast<size_t>(config) * shape.n_kv * r.n_tokens, gone.data(), gone.size() * 4);
  }
  // Marks what the prompt's cut dropped; how many tokens are held behind it.
  int drop_prompt(const DeviceReplayConfig& c, int head, int32_t* own) const {
    if (c.prompt_kept.empty()) return r.n_prompt;
    std::fill(own, own + r.n_prompt, r.n_prompt - 1);
    for (int32_t pos : c.prompt_kept[head]) own[pos] = gr::kHeld;
    return static_cast<int>(c.prompt_kept[head].size());
  }
  [[noreturn]] void fail_step(int step, int config) const {
    fail(
        "replay on {}: configuration {} (budget {}): step {}, layer {}: scores are NaN, the held tokens have "
        "less than 2^-70 of the weight, or every one is protected",
        api.describe(), config, r.configs[config].budget, step, r.layer);
  }

  struct Draft {
    gr::DecideTask task;
    int config, cluster, smem;
  };
  void make_tasks() {
    std::vector<Draft> drafts;
    for (int c = 0; c < n_configs; ++c) {
      const DeviceReplayConfig& config = r.configs[c];
      if (config.score == DeviceScore::none)
        fail("replay on {}: a configuration without a score", api.describe());
      if (config.score == DeviceScore::position) {
        decide_by_position(c);
        continue;
      }
      const EvictionRule& rule = config.rule;
      const bool shared = rule.granularity == Granularity::layer;
      const int n_rows = shared ? 1 : shape.n_kv, n_heads = shared ? shape.n_kv : 1;
      const int target = config.budget - rule.headroom;
      const bool whole_prompt = config.prompt_kept.empty() || gr::accumulates(config.score);
      for (int row = 0; row < n_rows; ++row) {
        gr::DecideTask t{};
        t.score = config.score;
        t.gqa = reduce_of(rule.gqa);
        t.last_tie = rule.ties == TieOrder::last;
        t.head = row;
        t.n_heads = n_heads;
        t.trigger = target + rule.slack;
        t.first_free = std::max(rule.sinks, rule.pin_prompt ? r.n_prompt : 0);
        t.recent = std::min(rule.recent_slots(config.budget), target);
        const int peak = std::max(whole_prompt ? r.n_prompt : 0, rule.peak_slots(config.budget));
        t.capacity = (std::min(r.n_tokens, peak) + 15) / 16 * 16;
        t.begin = gr::accumulates(config.score) ? 0 : r.n_prompt;
        // Of counter_random({seed, layer, row, step}) all but the step.
        t.seed = counter_random({config.seed, static_cast<uint64_t>(r.layer), static_cast<uint64_t>(row)});
        t.scale = 1.0f / static_cast<float>(n_heads * shape.group() * shape.dim);
        t.hole = t.failed = -1;
        int cluster = 1;
        while (limits.clusters && gr::attends(t.score) && cluster * 2 <= std::min(n_heads, gr::kMaxCluster))
          cluster *= 2;
        size_t bytes = gr::decide_layout(t.score, n_heads, shape.lanes(), t.capacity, cluster, false).end;
        t.large = bytes > static_cast<size_t>(limits.shared_bytes);
        if (t.large)
          bytes = gr::decide_layout(t.score, n_heads, shape.lanes(), t.capacity, cluster, true).end;
        if (bytes > static_cast<size_t>(limits.shared_bytes))
          fail("replay on {}: a budget of {} slots: expected at most {} bytes by slot, found {}",
               api.describe(), config.budget, limits.shared_bytes, bytes);
        t.last = last + (static_cast<size_t>(c) * shape.n_kv) * r.n_tokens;
        t.value_l1 = l1;
        any_sums |= gr::accumulates(t.score);
        drafts.push_back({t, c, cluster, static_cast<int>(bytes)});
      }
    }
    // Of one launch: alike in kind, and either all large or all fitting twice into a multiprocessor.
    const auto kind = [&](const Draft& d) {
      return std::tuple(d.task.large, gr::attends(d.task.score), d.cluster, d.smem > limits.shared_bytes / 2);
    };
    std::stable_sort(drafts.begin(), drafts.end(), [&](const Draft& a, const Draft& b) {
      return kind(a) != kind(b) ? kind(a) > kind(b) : a.smem > b.smem;
    });
    size_t slots = 0, sums = 0, scratch = 0;
    for (size_t i = 0; i < drafts.size(); ++i) {
      const Draft& d = drafts[i];
      if (i == 0 || kind(d) != kind(drafts[i - 1]))
        groups.push_back({static_cast<int>(i), 0, d.cluster, 0, 0, d.task.large != 0});
      ++groups.back().n;
      groups.back().smem = std::max(groups.back().smem, d.smem);
      groups.back().slots = std::max(groups.back().slots, d.task.capacity / d.cluster);
      slots += d.task.capacity;
      if (gr::accumulates(d.task.score)) sums += static_cast<size_t>(d.task.capacity) * d.task.n_heads;
      if (d.task.large)
        scratch += static_cast<size_t>(d.task.capacity) * gr::slot_floats(d.task.n_heads, shape.lanes());
    }
    auto* positions = on_device<int32_t>("positions", slots);
    int32_t* const first_positions = positions;
    std::vector<int32_t> held_positions(slots);
    auto* sum_floats = on_device<float>("sums", sums);
    auto* scratch_floats = on_device<float>("scratch", scratch);
    api.fill(sum_floats, 0, sums * 4);
    for (Draft& d : drafts) {
      gr::DecideTask& t = d.task;
      t.positions = positions;
      positions += t.capacity;
      if (gr::accumulates(t.score)) {
        t.sums = sum_floats;
        sum_floats += static_cast<size_t>(t.capacity) * t.n_heads;
      }
      if (t.large) {
        t.scratch = scratch_floats;
        scratch_floats += static_cast<size_t>(t.capacity) * gr::slot_floats(t.n_heads, shape.lanes());
      }
      const DeviceReplayConfig& config = r.configs[d.config];
      if (!config.prompt_kept.empty()) {
        for (int h = t.head; h < t.head + t.n_heads; ++h) {
          std::vector<int32_t> own(r.n_prompt, gr::kHeld);
          drop_prompt(config, h, own.data());
          api.upload(t.last + static_cast<size_t>(h) * r.n_tokens, own.data(), own.size() * 4);
        }
      }
      if (t.begin == r.n_prompt) {
        std::vector<int32_t> held(r.n_prompt);
        std::iota(held.begin(), held.end(), 0);
        if (!config.prompt_kept.empty()) held = config.prompt_kept[t.head];
        t.count = static_cast<int>(held.size());
        std::copy(held.begin(), held.end(), held_positions.begin() + (t.positions - first_positions));
      }
      tasks.push_back(t);
      task_configs.push_back(d.config);
    }
    api.upload(first_positions, held_positions.data(), slots * 4);
    device_tasks = on_device<gr::DecideTask>("tasks", std::max<size_t>(1, tasks.size()));
    api.upload(device_tasks, tasks.data(), tasks.size() * sizeof(gr::DecideTask));
  }

  // As many as score the largest task's slots in equal shares.
  int decide_threads(const Group& g) const {
    const int turns = (g.slots + limits.decide_threads - 1) / limits.decide_threads;
    return ((g.slots + turns - 1) / turns + 31) / 32 * 32;
  }
  // Accumulating scores have seen the prompt; its cut takes their sums along.
  void cut_prompts() {
    std::vector<int> cut;
    for (size_t i = 0; i < tasks.size(); ++i)
      if (gr::accumulates(tasks[i].score) && !r.configs[task_configs[i]].prompt_kept.empty())
        cut.push_back(static_cast<int>(i));
    if (cut.empty()) return;
    std::vector<gr::DecideTask> now(tasks.size());
    api.download(now.data(), device_tasks, now.size() * sizeof(gr::DecideTask));
    for (int i : cut) {
      gr::DecideTask& t = now[i];
      const std::vector<std::vector<int32_t>>& kept = r.configs[task_configs[i]].prompt_kept;
      std::vector<float> sums(t.capacity), left;
      for (int h = 0; h < t.n_heads; ++h) {
        float* of_head = t.sums + static_cast<size_t>(h) * t.capacity;
        api.download(sums.data(), of_head, sums.size() * 4);
        left.clear();
        for (int32_t pos : kept[t.head + h]) left.push_back(sums[pos]);  // a prompt's slots are its positions
        api.upload(of_head, left.data(), left.size() * 4);
      }
      t.count = static_cast<int>(kept[t.head].size());
      api.upload(t.positions, kept[t.head].data(), kept[t.head].size() * 4);
    }
    api.upload(device_tasks, now.data(), now.size() * sizeof(gr::DecideTask));
  }

  void load(int t0, int t1, float* q_block) {
    const size_t q_width = static_cast<size_t>(shape.n_q) * shape.dim,
                 kv_width = static_cast<size_t>(shape.n_kv) * shape.dim;
    const auto put = [&](char kind, float* staged, float* to, int first, size_t width) {
      r.rows(kind, first, t1 - first, staged + first * width);
      api.upload_later(to, staged + first * width, static_cast<size_t>(t1 - first) * width * 4);
    };
    put('k', k_host, k + t0 * kv_width, t0, kv_width);
    put('v', v_host, v + t0 * kv_width, t0, kv_width);
    r.rows('q', t0, t1 - t0, q_host + t0 * q_width);
    const int first = std::max(0, t0 - 1);
    api.upload_later(t0 > 0 ? q_block : q_block + q_width, q_host + first * q_width,
                     static_cast<size_t>(t1 - first) * q_width * 4);
  }

  void run() {
    const auto start = Clock::now();
    stage_start = start;
    allocate();
    make_tasks();
    stage("setup");
    const int first = any_sums ? 0 : std::min(begin, r.n_prompt) / 32 * 32;
    if (first > 0) load_keys(first);
    api.mark(kReady);
    for (int queue : {kMeasures, kCopies}) {
      api.use(queue);
      api.wait(kReady);
    }
    for (int t0 = first; t0 < end;) {
      int t1 = std::min(end, t0 / block_steps * block_steps + block_steps);
      if (t0 < r.n_prompt && t1 > r.n_prompt && any_sums) t1 = r.n_prompt;  // its cut comes between
      block(t0, t1);
      if (t1 == r.n_prompt) cut_prompts();
      t0 = t1;
    }
    measure_pending();
    collect();
    r.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  }

  void load_keys(int n) {
    const size_t width = static_cast<size_t>(shape.n_kv) * shape.dim;
    r.rows('k', 0, n, k_host);
    r.rows('v', 0, n, v_host);
    api.upload_later(k, k_host, n * width * 4);
    api.upload_later(v, v_host, n * width * 4);
    api.launch(gr::ValuesArgs{shape, v, l1, half, failed + 1, 0, n});
  }

  // What the recording alone asks for (logits of this block, then measures of the one before) runs beside the
  // decisions of this block and copies of the next. `last` may hold later steps than those that are measured,
  // which are as good as held.
  void block(int t0, int t1) {
    const size_t q_width = static_cast<size_t>(shape.n_q) * shape.dim;
    const int number = n_blocks++, side = number % 2;
    api.use(kCopies);
    api.wait(kMeasured + number % 3);  // q of three blocks ago
    load(t0, t1, q[number % 3]);
    api.mark(kLoaded + number % 3);
    stage("upload");
    api.use(kMeasures);
    api.wait(kLoaded + number % 3);
    api.wait(kDecided + side);  // weights of the block before the last
    api.launch(gr::ValuesArgs{shape, v, l1, half, failed + 1, t0, t1});
    api.launch(gr::LogitsArgs{shape, q[number % 3] + q_width, k, weights[side], peaks, t0, t1,
                              attention_scale(shape.dim)});
    stage("logits");
    const float* const own_q = q[number % 3];
    api.launch(gr::RowsArgs{shape, weights[side], peaks, half_weights[side], own_q + q_width,
                            t0 > 0 ? own_q : nullptr, facts[side], older, last_hot, entropy, cosine, failed,
                            t0, t1, begin});
    api.mark(kWeighed + side);
    stage("rows");
    api.use(kDecisions);
    api.wait(kWeighed + side);
    api.fork();
    for (const Group& g : groups)
      api.launch(gr::DecideArgs{shape, device_tasks + g.first, weights[side], g.n, g.cluster, t0, t1,
                                r.n_prompt, decide_threads(g), g.smem},
                 g.large);
    api.join();
    api.mark(kDecided + side);
    stage("decisions");
    measure_pending();
    pending = {t0, t1, number};
    api.use(kDecisions);
  }

  struct Pending {
    int t0 = 0, t1 = 0, number = -1;
  } pending;
  void measure_pending() {
    const auto [t0, t1, number] = std::exchange(pending, {});
    if (number < 0) return;
    const int side = number % 2;
    api.use(kMeasures);
    if (r.metrics && t1 > begin) {
      api.wait(kDecided + side);
      measure(t0, t1, side);
    }
    api.mark(kMeasured + number % 3);
  }
  void measure(int t0, int t1, int side) {
    api.fill(n_repairs, 0, 4);
    gr::OutputsArgs a{shape,   half_weights[side], half,      last, most_held, outputs, totals, metrics,
                      repairs, n_repairs,          n_configs, t0,   t1,        begin,   1};
    if (!r.time_stages) api.fork();
    api.launch(a);
    stage("full_outputs");
    api.launch(gr::MassesArgs{shape, weights[side], facts[side], last, metrics, n_configs, t0, t1, begin});
    stage("masses");
    api.launch(gr::FutureArgs{shape, weights[side], facts[side], last, future, n_configs, t0, t1, begin,
                              r.step_begin});
    stage("future");
    if (!r.time_stages) api.join();
    a.full = 0;
    api.launch(a);
    stage("outputs");
    api.launch(gr::RepairsArgs{shape, weights[side], v, outputs, last, repairs, n_repairs, metrics, n_configs,
                               t0, t1});
    stage("repairs");
  }

  void collect() {
    const auto heads = static_cast<size_t>(n_configs) * shape.n_kv,
               q_heads = static_cast<size_t>(n_configs) * shape.n_q,
               n_tokens = static_cast<size_t>(r.n_tokens);
    gr::HeadSums* sums = nullptr;
    uint32_t* sketches = nullptr;
    float* series = nullptr;
    double* missed = nullptr;
    api.use(kMeasures);
    for (int side = 0; side < 2; ++side) api.wait(kDecided + side);
    if (r.metrics) {
      sums = on_device<gr::HeadSums>("head_sums", q_heads);
      sketches = on_device<uint32_t>("sketches", q_heads * 4 * sketch_bins::kBins);
      series = on_device<float>("series", q_heads * 2 * r.n_series);
      missed = on_device<double>("missed", heads);
      api.launch(gr::CloseArgs{shape, metrics, sums, sketches, series, n_configs, r.n_series, begin, end});
      api.launch(gr::SumFutureArgs{future, missed, static_cast<int32_t>(heads), r.n_tokens});
    }
    stage("close");
    const auto done = answer("tasks", device_tasks, tasks.size());
    r.last = answer("last", last, heads * n_tokens);
    const auto bad = answer("failed", failed, 2);
    std::span<const gr::HeadSums> all;
    std::span<const float> entropies, cosines;
    if (r.metrics) {
      all = answer("head_sums", sums, q_heads);
      r.sketches = answer("sketches", sketches, q_heads * 4 * sketch_bins::kBins);
      r.series = answer("series", series, q_heads * 2 * r.n_series);
      r.future_missed = answer("missed", missed, heads);
      r.older = answer("older", older, n_tokens * shape.n_kv * gr::kHorizon);
      r.last_hot = answer("last_hot", last_hot, n_tokens * shape.n_kv);
      entropies = answer("entropy", entropy, n_tokens * shape.n_q);
      cosines = answer("cosine", cosine, n_tokens * shape.n_q);
    }
    api.use(kDecisions);
    api.synchronize();
    r.near_ties.assign(n_configs, 0);
    for (size_t i = 0; i < done.size(); ++i) {
      if (done[i].failed >= 0) fail_step(done[i].failed, task_configs[i]);
      r.near_ties[task_configs[i]] += done[i].near_ties;
    }
    if (bad[0] > 0) fail("replay: layer {}, step {}: expected finite logits", r.layer, bad[0] - 1);
    if (!r.metrics) return;
    if (bad[1] > 0)
      fail("replay on {}: layer {}, token {}: expected values of at most {}", api.describe(), r.layer,
           bad[1] - 1, gr::kLargestHalf);
    r.heads.clear();
    for (const gr::HeadSums& s : all)
      r.heads.push_back({s.low_recall, s.recall, s.recall_no_sinks, s.output_error, s.cosine_error,
                         s.topk_recall, s.missing});
    const auto sum_steps = [&](std::span<const float> values, std::vector<double>& to) {
      to.assign(shape.n_q, 0);
      for (int t = begin; t < end; ++t)
        for (int head = 0; head < shape.n_q; ++head)
          to[head] += values[static_cast<size_t>(t) * shape.n_q + head];
    };
    sum_steps(entropies, r.entropy);
    sum_steps(cosines, r.query_cosine);
    stage("download");
  }
};

GpuReplay::GpuReplay(std::unique_ptr<DeviceApi> api, size_t block_bytes)
    : api_(std::move(api)), block_bytes_(block_bytes) {}

GpuReplay::~GpuReplay() {
  for (auto& [name, buffer] : device_) api_->release(buffer.data);
  for (auto& [name, buffer] : host_) api_->release_host(buffer.data);
}

void* GpuReplay::device(const std::string& name, size_t bytes) {
  Buffer& buffer = device_[name];
  if (buffer.bytes >= bytes && buffer.data) return buffer.data;
  if (buffer.data) api_->release(std::exchange(buffer.data, nullptr));
  buffer.bytes = 0;
  buffer.data = api_->allocate(std::max<size_t>(bytes, 16));
  buffer.bytes = bytes;
  return buffer.data;
}

void* GpuReplay::host(const std::string& name, size_t bytes) {
  Buffer& buffer = host_[name];
  if (buffer.bytes >= bytes && buffer.data) return buffer.data;
  if (buffer.data) api_->release_host(std::exchange(buffer.data, nullptr));
  buffer.bytes = 0;
  buffer.data = api_->allocate_host(std::max<size_t>(bytes, 16));
  buffer.bytes = bytes;
  return buffer.data;
}

void GpuReplay::run(DeviceReplay& replay) {
  replay.stages.clear();
  Run(*this, replay).run();
}

}  // namespace kvlapse
