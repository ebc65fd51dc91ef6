#include "trace/cupti/activity_source.h"

#include <algorithm>
#include <cstdlib>

#include "trace/launch_join.h"

namespace kvlapse {
namespace {

constexpr size_t kBufferBytes = size_t{1} << 20;
constexpr int64_t kFlushInterval_ns = 200'000'000, kTakeInterval_ns = 50'000'000;
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
  } catch (...) {
    disable(enabled);
    if (subscriber_ != nullptr) api_.cuptiUnsubscribe(subscriber_);
    std::lock_guard lock(active_mutex);
    active = nullptr;
    throw;
  }
}

ActivitySource::~ActivitySource() {
  disable(std::size(kKinds));
  api_.cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  api_.cuptiUnsubscribe(subscriber_);
  std::lock_guard lock(active_mutex);
  active = nullptr;
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
  clocks_.push_back(best);
}

// Linear between the first and the newest pair.
int64_t ActivitySource::session_time(uint64_t profiler_ns) const {
  const ClockPair& first = clocks_.front();
  const ClockPair& last = clocks_.back();
  const auto since = static_cast<int64_t>(profiler_ns) - first.profiler_ns;
  const int64_t span = last.profiler_ns - first.profiler_ns;
  const double drift =
      span > 0 ? static_cast<double>((last.session_ns - first.session_ns) - span) / static_cast<double>(span)
               : 0;
  return first.session_ns + since + static_cast<int64_t>(static_cast<double>(since) * drift);
}

void ActivitySource::begin_step(int64_t step) {
  const Cost cost(session_ns_, overhead_ns_);
  running_ = step;
  steps_[step].start_ns = session_ns_();
  const CUptiResult pushed =
      api_.cuptiActivityPushExternalCorrelationId(kStepKind, static_cast<uint64_t>(step));
  if (pushed != CUPTI_SUCCESS) note(explain_cupti("cuptiActivityPushExternalCorrelationId", pushed));
}

void ActivitySource::end_step(std::vector<LaunchRecord> launches) {
  const Cost cost(session_ns_, overhead_ns_);
  uint64_t popped = 0;
  api_.cuptiActivityPopExternalCorrelationId(kStepKind, &popped);
  Step& step = steps_[running_];
  step.end_ns = session_ns_();
  step.launches = std::move(launches);
  ranges_.push_back({running_, step.start_ns, step.end_ns});
  running_ = -1;
  if (step.end_ns - last_flush_ns_ < kFlushInterval_ns) return;
  last_flush_ns_ = step.end_ns;
  flush(0);
}

void ActivitySource::flush(uint32_t flags) {
  const CUptiResult flushed = api_.cuptiActivityFlushAll(flags);
  if (flushed != CUPTI_SUCCESS) note(explain_cupti("cuptiActivityFlushAll", flushed));
}

void CUPTIAPI ActivitySource::request_buffer(uint8_t** buffer, size_t* size, size_t* max_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *size = *buffer != nullptr ? kBufferBytes : 0;
  *max_records = 0;
}

void CUPTIAPI ActivitySource::complete_buffer(CUcontext context, uint32_t stream, uint8_t* buffer,
                                              size_t /*size*/, size_t valid_bytes) {
  {
    std::lock_guard lock(active_mutex);
    if (active != nullptr) active->read_buffer(context, stream, buffer, valid_bytes);
  }
  std::free(buffer);
}

void ActivitySource::read_buffer(CUcontext context, uint32_t stream, uint8_t* buffer, size_t valid_bytes) {
  std::lock_guard lock(mutex_);
  CUpti_Activity* record = nullptr;
  CUptiResult found = CUPTI_SUCCESS;
  while (valid_bytes > 0 &&
         (found = api_.cuptiActivityGetNextRecord(buffer, valid_bytes, &record)) == CUPTI_SUCCESS)
    read_record(*record);
  if (found != CUPTI_SUCCESS && found != CUPTI_ERROR_MAX_LIMIT_REACHED && problem_.reason.empty())
    problem_ = explain_cupti("cuptiActivityGetNextRecord", found);
  size_t dropped = 0;
  if (api_.cuptiActivityGetNumDroppedRecords(context, stream, &dropped) == CUPTI_SUCCESS)
    dropped_ += static_cast<int64_t>(dropped);
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
      GpuKernel k;
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
      kernels_.push_back(std::move(k));
      ++records_;
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMCPY: {
      const auto& r = reinterpret_cast<const CUpti_ActivityMemcpy6&>(record);
      copies_.push_back({static_cast<int64_t>(r.start), static_cast<int64_t>(r.end), r.deviceId, r.contextId,
                         r.streamId, r.correlationId, r.graphNodeId, r.bytes, r.copyCount, r.copyKind,
                         r.srcKind, r.dstKind});
      ++records_;
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMSET: {
      const auto& r = reinterpret_cast<const CUpti_ActivityMemset4&>(record);
      fills_.push_back({static_cast<int64_t>(r.start), static_cast<int64_t>(r.end), r.deviceId, r.contextId,
                        r.streamId, r.correlationId, r.value, r.graphNodeId, r.bytes, r.memoryKind});
      ++records_;
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
  if (all) flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  int64_t newest = -1;  // step of which kernels came
  {
    std::lock_guard lock(mutex_);
    const auto timed = [&](auto& record) {
      record.start_ns = session_time(static_cast<uint64_t>(record.start_ns));
      record.end_ns = session_time(static_cast<uint64_t>(record.end_ns));
    };
    std::vector<GpuKernel> unknown;
    for (GpuKernel& kernel : kernels_) {
      const auto call = step_of_call_.find(kernel.correlation);
      if (call == step_of_call_.end() && !all) {
        unknown.push_back(std::move(kernel));  // the record of its call may still come
        continue;
      }
      timed(kernel);
      if (call != step_of_call_.end()) {
        kernel.step = call->second;
        newest = std::max(newest, kernel.step);
        steps_[kernel.step].kernels.push_back(std::move(kernel));
      } else {
        batch.kernels.push_back(std::move(kernel));
      }
    }
    kernels_ = std::move(unknown);
    for (GpuCopy& copy : copies_) timed(copy), batch.copies.push_back(copy);
    for (GpuFill& fill : fills_) timed(fill), batch.fills.push_back(fill);
    copies_.clear();
    fills_.clear();
  }
  for (auto& [id, step] : steps_)
    if (!step.kernels.empty()) newest = std::max(newest, id);
  while (!steps_.empty() && steps_.begin()->first != running_ &&
         (all || steps_.begin()->first + kStepSlack <= newest)) {
    Step& step = steps_.begin()->second;
    std::vector<GpuKernel*> order;
    for (GpuKernel& kernel : step.kernels) order.push_back(&kernel);
    std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->start_ns < b->start_ns; });
    join_launches(order, step.launches);
    for (GpuKernel* kernel : order) batch.kernels.push_back(std::move(*kernel));
    steps_.erase(steps_.begin());
  }
  forget_calls();
  batch.steps.insert(batch.steps.end(), ranges_.begin(), ranges_.end());
  ranges_.clear();
  // The first pair and, of the later ones, the newest.
  if (clocks_taken_ == 0) batch.clocks.push_back(clocks_.front());
  if (all && clocks_.size() > 1) batch.clocks.push_back(clocks_.back());
  clocks_taken_ = clocks_.size();
  if (clocks_.size() > 2) clocks_.erase(clocks_.begin() + 1, clocks_.end() - 1);
}

// Calls of steps that were taken.
void ActivitySource::forget_calls() {
  std::lock_guard lock(mutex_);
  if (step_of_call_.size() < kMaxCalls || steps_.empty()) return;
  const int64_t oldest = steps_.begin()->first;
  std::erase_if(step_of_call_, [&](const auto& call) { return call.second + kStepSlack < oldest; });
}

GpuSource ActivitySource::summary() const {
  std::lock_guard lock(mutex_);
  return {"activity", "measured", problem_.reason, problem_.advice, records_, dropped_, overhead_ns_};
}

}  // namespace kvlapse
