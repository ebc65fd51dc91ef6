#include "trace/gpu_rows.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

namespace kvlapse {
namespace {

constexpr int kPushPopRange = 59;  // NVTX_EVENTS.eventType

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string out = status == 0 && text != nullptr ? text : name;
  std::free(text);
  return out;
}

// "void ns::Type<T>::kernel<int>(Args)" gives "kernel", as nsys's shortName does.
std::string short_name(std::string full) {
  const std::string unnamed = "(anonymous namespace)::";
  for (size_t at; (at = full.find(unnamed)) != std::string::npos;) full.erase(at, unnamed.size());
  size_t begin = 0, end = std::string::npos;  // of the last part of the path so far
  int depth = 0;
  for (size_t i = 0; i < full.size(); ++i) {
    const char c = full[i];
    if (c == '(' && depth == 0) {
      end = std::min(end, i);
      break;
    }
    if (c == '<' && depth++ == 0) end = i;
    if (c == '>') --depth;
    if (depth > 0 || c == '>') continue;
    if (c == ' ' || c == ':') begin = i + 1, end = std::string::npos;
  }
  return full.substr(begin, end == std::string::npos ? end : end - begin);
}

}  // namespace

std::string_view intern_name(std::string_view name) {
  static std::mutex mutex;
  static std::set<std::string, std::less<>> names;
  std::lock_guard lock(mutex);
  const auto found = names.find(name);
  return found != names.end() ? *found : *names.emplace(name).first;
}

struct GpuRows::Impl {
  explicit Impl(Database& db)
      : database(db),
        string(db, "INSERT INTO StringIds(id, value) VALUES(?, ?)"),
        kernel(db,
               "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL(rowid, start, \"end\", deviceId, contextId, streamId, "
               "correlationId, demangledName, shortName, mangledName, launchType, registersPerThread, gridX, "
               "gridY, gridZ, blockX, blockY, blockZ, staticSharedMemory, dynamicSharedMemory, "
               "localMemoryPerThread, localMemoryTotal, gridId, sharedMemoryExecuted, graphNodeId, graphId, "
               "clusterX, clusterY, clusterZ, maxPotentialClusterSize, maxActiveClusters, "
               "tensorSizeMinusOneElements) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, "
               "?, ?, "
               "?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '')"),
        launch(db,
               "INSERT INTO KV_LAUNCH(kernel, step, layer, phase, launch, modelled_bytes) "
               "VALUES(?, ?, ?, ?, ?, ?)"),
        copy(db,
             "INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY(start, \"end\", deviceId, contextId, streamId, "
             "correlationId, bytes, copyKind, srcKind, dstKind, graphNodeId, copyCount) "
             "VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"),
        fill(db,
             "INSERT INTO CUPTI_ACTIVITY_KIND_MEMSET(start, \"end\", deviceId, contextId, streamId, "
             "correlationId, value, bytes, graphNodeId, memKind) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"),
        range(db,
              "INSERT INTO NVTX_EVENTS(start, \"end\", eventType, text, int64Value, eventId) "
              "VALUES(?, ?, ?, ?, ?, ?)"),
        dram(db,
             "INSERT INTO KV_DRAM_SAMPLE(start_ns, end_ns, read_bytes, write_bytes, l2_bytes) "
             "VALUES(?, ?, ?, ?, ?)"),
        counter(db,
                "INSERT OR REPLACE INTO KV_KERNEL_COUNTER(step, ordinal, layer, phase, launch, "
                "modelled_bytes, duration_ns, dram_read_bytes, dram_write_bytes, l2_bytes, dram_percent, "
                "warps_percent, bytes_ratio) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"),
        clock(db, "INSERT INTO KV_CLOCK(profiler_ns, session_ns) VALUES(?, ?)"),
        source(db,
               "INSERT OR REPLACE INTO KV_SOURCE(name, state, provenance, reason, advice, records, dropped, "
               "overhead_ns) VALUES(?, ?, ?, ?, ?, ?, ?, ?)"),
        device(db,
               "INSERT INTO TARGET_INFO_GPU(vmId, id, name, isDiscrete, l2CacheSize, totalMemory, smCount, "
               "chipName, cuDevice, computeMajor, computeMinor, clockRate) VALUES(0, ?, ?, 1, ?, ?, ?, ?, ?, "
               "?, ?, "
               "nullif(?, 0))"),
        start(db, "INSERT INTO TARGET_INFO_SESSION_START_TIME(utcEpochNs) VALUES(?)"),
        next_kernel(db.query_integer("SELECT coalesce(max(rowid), 0) + 1 FROM CUPTI_ACTIVITY_KIND_KERNEL")),
        next_range(db.query_integer("SELECT coalesce(max(eventId), 0) + 1 FROM NVTX_EVENTS")) {
    Statement known(db, "SELECT id, value FROM StringIds");
    while (known.step()) strings[std::string(known.text(1))] = known.integer(0);
  }

  int64_t id_of(const std::string& text) {
    auto [found, added] = strings.try_emplace(text, static_cast<int64_t>(strings.size()) + 1);
    if (added) string.run(found->second, std::string_view(text));
    return found->second;
  }

  struct Names {
    int64_t demangled, shortened, mangled;
  };
  Names names_of(std::string_view mangled) {
    auto found = names.find(mangled);
    if (found == names.end()) {
      const std::string name(mangled), full = demangled(name);
      found = names.emplace(name, Names{id_of(full), id_of(short_name(full)), id_of(name)}).first;
    }
    return found->second;
  }

  static void bind_launch(Statement& to, int first, const std::optional<LaunchRecord>& record) {
    if (!record) {
      for (int i = 0; i < 4; ++i) to.bind_null(first + i);
      return;
    }
    if (record->layer < 0)
      to.bind_null(first);
    else
      to.bind(first, record->layer);
    to.bind(first + 1, record->phase).bind(first + 2, std::string_view(record->name));
    if (record->expected_bytes == 0)
      to.bind_null(first + 3);
    else
      to.bind(first + 3, static_cast<int64_t>(record->expected_bytes));
  }

  void write(const GpuKernel& k) {
    const Names n = names_of(k.mangled_name);
    const int64_t row = next_kernel++;
    kernel.run(row, k.start_ns, k.end_ns, int64_t{k.device}, int64_t{k.context}, int64_t{k.stream},
               int64_t{k.correlation}, n.demangled, n.shortened, n.mangled, int64_t{k.launch_type},
               int64_t{k.registers}, k.grid[0], k.grid[1], k.grid[2], k.block[0], k.block[1], k.block[2],
               k.static_smem_bytes, k.dynamic_smem_bytes, int64_t{k.local_bytes_per_thread},
               static_cast<int64_t>(k.local_bytes), k.grid_id, static_cast<int64_t>(k.executed_smem_bytes),
               static_cast<int64_t>(k.graph_node), int64_t{k.graph}, int64_t{k.cluster[0]},
               int64_t{k.cluster[1]}, int64_t{k.cluster[2]}, int64_t{k.max_cluster},
               int64_t{k.max_active_clusters});
    if (k.step < 0) return;
    launch.bind(1, row).bind(2, k.step);
    bind_launch(launch, 3, k.launch);
    launch.step();
    launch.reset();
  }

  void write(const KernelCounters& c) {
    counter.bind(1, c.step).bind(2, c.ordinal);
    bind_launch(counter, 3, c.launch);
    counter.bind(7, c.duration_ns)
        .bind(8, c.dram_read_bytes)
        .bind(9, c.dram_write_bytes)
        .bind(10, c.l2_bytes)
        .bind(11, c.dram_percent)
        .bind(12, c.warps_percent);
    if (c.launch && c.launch->expected_bytes > 0)
      counter.bind(13,
                   (c.dram_read_bytes + c.dram_write_bytes) / static_cast<double>(c.launch->expected_bytes));
    else
      counter.bind_null(13);
    counter.step();
    counter.reset();
  }

  Database& database;
  Statement string, kernel, launch, copy, fill, range, dram, counter, clock, source, device, start;
  std::map<std::string, int64_t> strings;
  std::map<std::string, Names, std::less<>> names;  // by mangled name
  int64_t next_kernel, next_range;
};

GpuRows::GpuRows(Database& database) : impl_(std::make_unique<Impl>(database)) {}
GpuRows::~GpuRows() = default;

void GpuRows::write(const GpuBatch& batch) {
  Impl& to = *impl_;
  if (batch.utc_epoch_ns) to.start.run(*batch.utc_epoch_ns);
  for (const GpuDevice& d : batch.devices)
    to.device.run(d.id, std::string_view(d.name), d.l2_bytes, d.memory_bytes, d.multiprocessors,
                  std::string_view(d.chip), d.id, d.compute_major, d.compute_minor, d.clock_hz);
  for (const GpuKernel& k : batch.kernels) to.write(k);
  for (const GpuCopy& c : batch.copies)
    to.copy.run(c.start_ns, c.end_ns, int64_t{c.device}, int64_t{c.context}, int64_t{c.stream},
                int64_t{c.correlation}, static_cast<int64_t>(c.bytes), int64_t{c.copy_kind},
                int64_t{c.source_kind}, int64_t{c.target_kind}, static_cast<int64_t>(c.graph_node),
                static_cast<int64_t>(c.copies));
  for (const GpuFill& f : batch.fills)
    to.fill.run(f.start_ns, f.end_ns, int64_t{f.device}, int64_t{f.context}, int64_t{f.stream},
                int64_t{f.correlation}, int64_t{f.value}, static_cast<int64_t>(f.bytes),
                static_cast<int64_t>(f.graph_node), int64_t{f.memory_kind});
  for (const GpuStepRange& r : batch.steps)
    to.range.run(r.start_ns, r.end_ns, kPushPopRange, std::string_view("step " + std::to_string(r.step)),
                 r.step, to.next_range++);
  for (const DramSample& s : batch.dram)
    to.dram.run(s.start_ns, s.end_ns, s.read_bytes, s.write_bytes, s.l2_bytes);
  for (const KernelCounters& c : batch.counters) to.write(c);
  for (const ClockPair& c : batch.clocks) to.clock.run(c.profiler_ns, c.session_ns);
  for (const GpuSource& s : batch.sources)
    to.source.run(std::string_view(s.name), s.state(), std::string_view(s.provenance),
                  std::string_view(s.reason), std::string_view(s.advice), s.records, s.dropped,
                  s.overhead_ns);
}

std::vector<GpuSource> load_gpu_sources(Database& database) {
  std::vector<GpuSource> sources;
  if (database.query_integer("SELECT count(*) FROM sqlite_master WHERE name = 'KV_SOURCE'") == 0)
    return sources;
  Statement select(database,
                   "SELECT name, provenance, reason, advice, records, dropped, overhead_ns FROM KV_SOURCE "
                   "ORDER BY name");
  while (select.step())
    sources.push_back({std::string(select.text(0)), std::string(select.text(1)), std::string(select.text(2)),
                       std::string(select.text(3)), select.integer(4), select.integer(5), select.integer(6)});
  return sources;
}

}  // namespace kvlapse
