#include "trace/cupti/activity_source.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iterator>
#include <utility>

#include "trace/launch_join.h"

namespace kvlapse {
namespace {

constexpr size_t kBufferBytes = size_t{1} << 20;
constexpr int64_t kTakeInterval_ns = 50'000'000;
constexpr auto kFlushInterval = std::chrono::milliseconds(200), kLookInterval = std::chrono::milliseconds(50);
// Kernels of a step are whole when those of a later step came: buffers arrive in the order of completion, and
// two steps of slack cover the seam between two buffers.
constexpr int64_t kStepSlack = 2;
constexpr size_t kMaxCalls = 1 << 16;
constexpr auto kStepKind = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0;
constexpr CUpti_ActivityKind kKinds[] = {
    CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET,
    // External correlation is reported for API calls that are recorded.
    CUPTI_ACTIVITY_KIND_RUNTIME, CUPTI_ACTIVITY_KIND_DRIVER, CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION};

ActivitySource* active = nullptr;  // CUPTI's buffer callbacks carry no context
std::mutex active_mutex;

// Buffers that were read: pages of new ones would be made on the thread that launches.
std::vector<uint8_t*> spare_buffers;
std::mutex spare_mutex;
constexpr size_t kMaxSpareBuffers = 64;
void give_buffer_back(uint8_t* buffer) {
  {
    std::lock_guard lock(spare_mutex);
    if (spare_buffers.size() < kMaxSpareBuffers) return spare_buffers.push_back(buffer);
  }
  std::free(buffer);
}

void CUPTIAPI ignore_callback(void*, CUpti_CallbackDomain, CUpti_CallbackId, const void*) {}

// Adds the time of a scope.
class Cost {
 public:
  Cost(const std::function<int64_t()>& clock, int64_t& total)
      : clock_(clock), total_(total), start_(clock()) {}
  ~Cost() { total_ += clock_() - start_; }
  Cost(const Cost&) = delete;
  Cost& operator=(const Cost&) = delete;

 private:
  const std::function<int64_t()>& clock_;
  int64_t& total_;
  int64_t start_;
};

}  // namespace

ActivitySource::ActivitySource(const CuptiApi& api, std::function<int64_t()> session_ns)
    : api_(api), session_ns_(std::move(session_ns)) {
  {
    std::lock_guard lock(active_mutex);
    if (active != nullptr)
      throw CuptiFailure{{"this process records GPU activity already", "record one trace at a time"}};
    active = this;
  }
  size_t enabled = 0;
  try {
    char holder[CUPTI_OLD_SUBSCRIBER_NAME_MIN_LEN] = {};
    CUpti_SubscriberParams params{};
    params.structSize = CUpti_SubscriberParams_STRUCT_SIZE;
    params.subscriberName = "kvlapse";
    params.oldSubscriberName = holder;
    params.oldSubscriberSize = sizeof holder;
    const CUptiResult subscribed = api_.cuptiSubscribe_v2(&subscriber_, ignore_callback, nullptr, &params);
    if (subscribed != CUPTI_SUCCESS) {
      subscriber_ = nullptr;
      throw CuptiFailure{explain_cupti("cuptiSubscribe_v2", subscribed, holder)};
    }
    KVLAPSE_CUPTI(api_, cuptiActivityRegisterCallbacks, request_buffer, complete_buffer);
    for (; enabled < std::size(kKinds); ++enabled) KVLAPSE_CUPTI(api_, cuptiActivityEnable, kKinds[enabled]);
    align_clock();
    thread_ = std::thread([this] { run(); });
  } catch (...) {
    disable(enabled);
    if (subscriber_ != nullptr) api_.cuptiUnsubscribe(subscriber_);
    std::lock_guard lock(active_mutex);
    active = nullptr;
    throw;
  }
}

ActivitySource::~ActivitySource() {
  stop();
  disable(std::size(kKinds));
  api_.cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  api_.cuptiUnsubscribe(subscriber_);
  std::lock_guard lock(active_mutex);
  active = nullptr;
  for (const Buffer& buffer : buffers_) give_buffer_back(buffer.data);
}

void ActivitySource::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  came_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void ActivitySource::run() {
  auto flushed = std::chrono::steady_clock::now();
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    came_.wait_for(lock, kLookInterval, [&] { return stopping_ || !buffers_.empty(); });
    if (stopping_) return;
    lock.unlock();
    if (const auto now = std::chrono::steady_clock::now(); now - flushed >= kFlushInterval) {
      flushed = now;
      flush(0);
    }
    process(false);
    lock.lock();
  }
}

void ActivitySource::disable(size_t n_enabled) {
  for (size_t i = 0; i < n_enabled; ++i) api_.cuptiActivityDisable(kKinds[i]);
}

void ActivitySource::note(const CuptiProblem& problem) {
  std::lock_guard lock(mutex_);
  if (problem_.reason.empty()) problem_ = problem;
}

// One instant on both clocks; the shortest of a few readings is the most exact.
void ActivitySource::align_clock() {
  ClockPair best;
  int64_t shortest = INT64_MAX;
  for (int i = 0; i < 8; ++i) {
    uint64_t profiler = 0;
    const int64_t before = session_ns_();
    KVLAPSE_CUPTI(api_, cuptiGetTimestamp, &profiler);
    const int64_t after = session_ns_();
    if (after - before >= shortest) continue;
    shortest = after - before;
    best = {static_cast<int64_t>(profiler), before + (after - before) / 2};
  }
  std::lock_guard lock(mutex_);
  if (clocks_.size() > 1) clocks_.pop_back();
  clocks_.push_back(best);
}

void ActivitySource::begin_step(int64_t step) {
  const Cost cost(session_ns_, overhead_ns_);
  running_ = step;
  start_ns_ = session_ns_();
  const CUptiResult pushed =
      api_.cuptiActivityPushExternalCorrelationId(kStepKind, static_cast<uint64_t>(step));
  if (pushed != CUPTI_SUCCESS) note(explain_cupti("cuptiActivityPushExternalCorrelationId", pushed));
}

void ActivitySource::end_step(std::vector<LaunchRecord> launches) {
  const Cost cost(session_ns_, overhead_ns_);
  uint64_t popped = 0;
  api_.cuptiActivityPopExternalCorrelationId(kStepKind, &popped);
  const int64_t end_ns = session_ns_();
  std::lock_guard lock(mutex_);
  ended_.push_back({running_, std::move(launches)});
  ready_.steps.push_back({running_, start_ns_, end_ns});
  running_ = -1;
}

void ActivitySource::flush(uint32_t flags) {
  const CUptiResult flushed = api_.cuptiActivityFlushAll(flags);
  if (flushed != CUPTI_SUCCESS) note(explain_cupti("cuptiActivityFlushAll", flushed));
}

void CUPTIAPI ActivitySource::request_buffer(uint8_t** buffer, size_t* size, size_t* max_records) {
  *buffer = nullptr;
  {
    std::lock_guard lock(spare_mutex);
    if (!spare_buffers.empty()) {
      *buffer = spare_buffers.back();
      spare_buffers.pop_back();
    }
  }
  if (*buffer == nullptr) *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *size = *buffer != nullptr ? kBufferBytes : 0;
  *max_records = 0;
}

void CUPTIAPI ActivitySource::complete_buffer(CUcontext context, uint32_t stream, uint8_t* buffer,
                                              size_t /*size*/, size_t valid_bytes) {
  std::lock_guard lock(active_mutex);
  if (active == nullptr) return give_buffer_back(buffer);
  {
    std::lock_guard inner(active->mutex_);
    active->buffers_.push_back({context, stream, buffer, valid_bytes});
  }
  active->came_.notify_one();
}

void ActivitySource::read_buffer(const Buffer& buffer) {
  CUpti_Activity* record = nullptr;
  CUptiResult found = CUPTI_SUCCESS;
  while (buffer.valid_bytes > 0 &&
         (found = api_.cuptiActivityGetNextRecord(buffer.data, buffer.valid_bytes, &record)) == CUPTI_SUCCESS)
    read_record(*record);
  if (found != CUPTI_SUCCESS && found != CUPTI_ERROR_MAX_LIMIT_REACHED)
    note(explain_cupti("cuptiActivityGetNextRecord", found));
  size_t dropped = 0;
  if (api_.cuptiActivityGetNumDroppedRecords(buffer.context, buffer.stream, &dropped) == CUPTI_SUCCESS)
    n_lost_ += static_cast<int64_t>(dropped);
}

// CUPTI hands out one address a kernel function.
std::string_view ActivitySource::name_of(const char* name) {
  if (name == nullptr) return "?";
  auto [found, added] = names_.try_emplace(name);
  if (added) found->second = intern_name(name);
  return found->second;
}

// Times stay the profiler's until they are taken.
void ActivitySource::read_record(const CUpti_Activity& record) {
  switch (record.kind) {
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL:
    case CUPTI_ACTIVITY_KIND_KERNEL: {
      const auto& r = reinterpret_cast<const CUpti_ActivityKernel10&>(record);
      GpuKernel& k = arrived_.emplace_back();
      k.start_ns = static_cast<int64_t>(r.start), k.end_ns = static_cast<int64_t>(r.end);
      k.device = r.deviceId, k.context = r.contextId, k.stream = r.streamId;
      k.correlation = r.correlationId, k.graph = r.graphId, k.graph_node = r.graphNodeId;
      k.grid_id = r.gridId;
      k.mangled_name = name_of(r.name);
      k.grid[0] = r.gridX, k.grid[1] = r.gridY, k.grid[2] = r.gridZ;
      k.block[0] = r.blockX, k.block[1] = r.blockY, k.block[2] = r.blockZ;
      k.cluster[0] = r.clusterX, k.cluster[1] = r.clusterY, k.cluster[2] = r.clusterZ;
      k.registers = r.registersPerThread, k.local_bytes_per_thread = r.localMemoryPerThread;
      k.max_cluster = r.maxPotentialClusterSize, k.max_active_clusters = r.maxActiveClusters;
      k.static_smem_bytes = r.staticSharedMemory, k.dynamic_smem_bytes = r.dynamicSharedMemory;
      k.local_bytes = r.localMemoryTotal_v2, k.executed_smem_bytes = r.sharedMemoryExecuted;
      k.launch_type = r.launchType;
      ++n_read_;
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMCPY: {
      const auto& r = reinterpret_cast<const CUpti_ActivityMemcpy6&>(record);
      read_.copies.push_back({static_cast<int64_t>(r.start), static_cast<int64_t>(r.end), r.deviceId,
                              r.contextId, r.streamId, r.correlationId, r.graphNodeId, r.bytes, r.copyCount,
                              r.copyKind, r.srcKind, r.dstKind});
      ++n_read_;
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMSET: {
      const auto& r = reinterpret_cast<const CUpti_ActivityMemset4&>(record);
      read_.fills.push_back({static_cast<int64_t>(r.start), static_cast<int64_t>(r.end), r.deviceId,
                             r.contextId, r.streamId, r.correlationId, r.value, r.graphNodeId, r.bytes,
                             r.memoryKind});
      ++n_read_;
      break;
    }
    case CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION: {
      const auto& r = reinterpret_cast<const CUpti_ActivityExternalCorrelation&>(record);
      if (r.externalKind == kStepKind) step_of_call_[r.correlationId] = static_cast<int64_t>(r.externalId);
      break;
    }
    default: break;
  }
}

// Into its step, into `out` when that was handed out already, or aside while its call is not known.
void ActivitySource::place(GpuKernel& kernel, GpuBatch& out) {
  // A graph is one call: kernels of one follow each other.
  if (kernel.correlation != last_call_) {
    const auto call = step_of_call_.find(kernel.correlation);
    if (call == step_of_call_.end()) return read_.kernels.push_back(std::move(kernel));
    last_call_ = kernel.correlation, last_call_step_ = call->second;
  }
  kernel.step = last_call_step_;
  newest_ = std::max(newest_, kernel.step);
  (kernel.step <= handed_out_ ? out.kernels : steps_[kernel.step].kernels).push_back(std::move(kernel));
}

void ActivitySource::process(bool all) {
  std::vector<Buffer> buffers;
  std::vector<EndedStep> ended;
  ClockPair first, last;
  {
    std::lock_guard lock(mutex_);
    buffers = std::exchange(buffers_, {});
    ended = std::exchange(ended_, {});
    first = clocks_.front(), last = clocks_.back();
  }
  for (EndedStep& e : ended) {
    if (e.step <= handed_out_) continue;
    Step& step = steps_[e.step];
    step.ended = true;
    step.launches = std::move(e.launches);
  }
  GpuBatch out;
  arrived_ = std::exchange(read_.kernels, {});
  last_call_ = 0, last_call_step_ = -1;
  for (const Buffer& buffer : buffers) {
    read_buffer(buffer);
    give_buffer_back(buffer.data);
  }
  // Records of calls come in buffers of their own, before or after those of their kernels.
  for (GpuKernel& kernel : arrived_) place(kernel, out);
  arrived_.clear();
  if (all) std::ranges::move(std::exchange(read_.kernels, {}), std::back_inserter(out.kernels));
  while (!steps_.empty()) {
    const int64_t id = steps_.begin()->first;
    Step& step = steps_.begin()->second;
    if (!all && (!step.ended || id + kStepSlack > newest_)) break;
    std::vector<GpuKernel*> order;
    order.reserve(step.kernels.size());
    for (GpuKernel& kernel : step.kernels) order.push_back(&kernel);
    std::ranges::sort(order, {}, [](const GpuKernel* k) { return k->start_ns; });
    join_launches(order, step.launches);
    for (GpuKernel* kernel : order) out.kernels.push_back(std::move(*kernel));
    handed_out_ = std::max(handed_out_, id);
    steps_.erase(steps_.begin());
  }
  std::swap(out.copies, read_.copies);
  std::swap(out.fills, read_.fills);
  // Linear between the first and the newest pair of clocks.
  const int64_t span = last.profiler_ns - first.profiler_ns;
  const double drift =
      span > 0 ? static_cast<double>((last.session_ns - first.session_ns) - span) / static_cast<double>(span)
               : 0;
  const auto session_time = [&](int64_t profiler_ns) {
    const int64_t since = profiler_ns - first.profiler_ns;
    return first.session_ns + since + static_cast<int64_t>(static_cast<double>(since) * drift);
  };
  const auto timed = [&](auto& records) {
    for (auto& r : records) r.start_ns = session_time(r.start_ns), r.end_ns = session_time(r.end_ns);
  };
  timed(out.kernels);
  timed(out.copies);
  timed(out.fills);
  if (step_of_call_.size() >= kMaxCalls)  // those of steps that were handed out
    std::erase_if(step_of_call_, [&](const auto& call) { return call.second + kStepSlack < handed_out_; });
  const auto append = [](auto& to, auto& from) {
    if (to.empty())
      to = std::move(from);
    else
      std::ranges::move(from, std::back_inserter(to));
  };
  std::lock_guard lock(mutex_);
  append(ready_.kernels, out.kernels);
  append(ready_.copies, out.copies);
  append(ready_.fills, out.fills);
  records_ += std::exchange(n_read_, 0);
  dropped_ += std::exchange(n_lost_, 0);
}

void ActivitySource::take(GpuBatch& batch, bool all) {
  const int64_t now_ns = session_ns_();
  if (!all && now_ns - last_take_ns_ < kTakeInterval_ns) return;
  last_take_ns_ = now_ns;
  const Cost cost(session_ns_, overhead_ns_);
  try {
    align_clock();
  } catch (const CuptiFailure& failure) {
    note(failure.problem);
  }
  if (all) {
    stop();
    flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
    process(true);
  }
  std::lock_guard lock(mutex_);
  const auto append = [](auto& to, auto& from) {
    if (to.empty())
      to = std::move(from);
    else
      std::ranges::move(from, std::back_inserter(to));
    from.clear();
  };
  append(batch.kernels, ready_.kernels);
  append(batch.copies, ready_.copies);
  append(batch.fills, ready_.fills);
  append(batch.steps, ready_.steps);
  // The first pair and, of the later ones, the newest.
  if (clocks_taken_ == 0) batch.clocks.push_back(clocks_.front());
  if (all && clocks_.size() > 1) batch.clocks.push_back(clocks_.back());
  clocks_taken_ = clocks_.size();
}

GpuSource ActivitySource::summary() const {
  std::lock_guard lock(mutex_);
  return {"activity", "measured", problem_.reason, problem_.advice, records_, dropped_, overhead_ns_};
}

}  // namespace kvlapse
