#include "trace/views/kernel_view.h"

#include <algorithm>
#include <map>

#include "core/base/error.h"
#include "trace/sql.h"

namespace kvlapse {
namespace {

std::string meta_value(const TraceReader& reader, const std::string& key) {
  const auto meta = reader.meta();
  const auto found = meta.find(key);
  return found == meta.end() ? std::string() : found->second;
}

double number(const SqlValue& value, double missing = 0) {
  if (const auto* whole = std::get_if<int64_t>(&value)) return static_cast<double>(*whole);
  if (const auto* real = std::get_if<double>(&value)) return *real;
  return missing;
}
int64_t whole(const SqlValue& value, int64_t missing = 0) {
  const auto* integer = std::get_if<int64_t>(&value);
  return integer != nullptr ? *integer : missing;
}
std::string text(const SqlValue& value) {
  const auto* string = std::get_if<std::string>(&value);
  return string != nullptr ? *string : std::string();
}

int64_t count(const TraceReader& reader, const std::string& sql) {
  SqlQuery query(reader.file(), sql);
  std::vector<SqlValue> row;
  return query.next(row) ? whole(row[0]) : 0;
}

// Files of older formats, and of recordings without a GPU, have no such table.
bool has_rows(const TraceReader& reader, const std::string& table) {
  return count(reader, fmt::format("SELECT count(*) FROM sqlite_master WHERE name = '{}'", table)) > 0 &&
         count(reader, fmt::format("SELECT EXISTS(SELECT 1 FROM {})", table)) > 0;
}

// "" when that source was recorded, or not asked for.
std::string source_reason(const TraceReader& reader, std::string_view name) {
  for (const GpuSource& source : reader.gpu_sources()) {
    if (source.name == name && !source.reason.empty())
      return source.advice.empty() ? source.reason : source.reason + "; " + source.advice;
  }
  return {};
}

std::string in_span(const TimeSpan& span, std::string_view start) {
  return span.begin_ns == INT64_MIN && span.end_ns == INT64_MAX
             ? std::string("1")
             : fmt::format("{0} >= {1} AND {0} < {2}", start, span.begin_ns, span.end_ns);
}

}  // namespace

TimeSpan step_span(const TraceReader& reader, int sequence, int begin, int end) {
  if (sequence >= reader.n_sequences()) return {0, 0};  // nothing was recorded yet
  const std::vector<TraceStep> steps = reader.steps(sequence, begin, end);
  if (steps.empty()) return {0, 0};
  const StepSummary& last = steps.back().summary;
  return {steps.front().summary.start_ns, last.start_ns + last.total_ns};
}

std::string counters_absence(const TraceReader& reader) {
  for (const char* source : {"dram", "kernels"}) {
    if (const std::string why = source_reason(reader, source); !why.empty())
      return why + "; run kvlapse doctor";
  }
  if (has_rows(reader, "KV_DRAM_SAMPLE") || has_rows(reader, "KV_KERNEL_COUNTER")) return {};
  const std::string device = meta_value(reader, "device");
  const std::string wanted = meta_value(reader, "counters");
  if (device.find("cuda") == std::string::npos && device.find("NVIDIA") == std::string::npos)
    return "recorded on " + (device.empty() ? std::string("a device without GPU counters") : device) +
           "; GPU counters need --device cuda --counters dram or kernels";
  return "counters were not asked for (" + (wanted.empty() ? std::string("none") : wanted) +
         "); record with --counters dram or kernels";
}

KernelSummary read_kernels(const TraceReader& reader, const TimeSpan& span) {
  KernelSummary summary;
  if (!has_rows(reader, "CUPTI_ACTIVITY_KIND_KERNEL")) {
    const std::string why = source_reason(reader, "activity");
    summary.absence = "No kernels in this trace: " + (why.empty() ? counters_absence(reader) : why) + ".";
    return summary;
  }
  const bool launches = has_rows(reader, "KV_LAUNCH");
  SqlQuery query(
      reader.file(),
      fmt::format("SELECT s.value, count(*), sum(k.end - k.start) * 1e-6, avg(k.end - k.start) * 1e-3,"
                  " min(k.end - k.start) * 1e-3, max(k.end - k.start) * 1e-3, {}"
                  " FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.shortName {} WHERE {} "
                  "GROUP BY s.value ORDER BY 3 DESC",
                  launches ? "avg(l.modelled_bytes), max(l.launch)" : "NULL, NULL",
                  launches ? "LEFT JOIN KV_LAUNCH l ON l.kernel = k.rowid" : "", in_span(span, "k.start")));
  std::map<std::string, std::vector<size_t>> by_launch;  // our name of it: rows
  for (std::vector<SqlValue> row; query.next(row);) {
    by_launch[text(row[7])].push_back(summary.rows.size());
    summary.rows.push_back({.name = text(row[0]),
                            .launches = whole(row[1]),
                            .total_ms = number(row[2]),
                            .mean_us = number(row[3]),
                            .min_us = number(row[4]),
                            .max_us = number(row[5]),
                            .modelled_bytes = number(row[6], NAN)});
  }
  if (has_rows(reader, "KV_KERNEL_COUNTER")) {
    SqlQuery counters(
        reader.file(),
        "SELECT launch, avg(dram_read_bytes + dram_write_bytes), avg(bytes_ratio), "
        "avg(warps_percent), count(*) FROM KV_KERNEL_COUNTER WHERE launch IS NOT NULL GROUP BY launch");
    for (std::vector<SqlValue> row; counters.next(row);) {
      for (const size_t at : by_launch[text(row[0])]) {
        KernelRow& kernel = summary.rows[at];
        kernel.dram_bytes = number(row[1], NAN), kernel.bytes_ratio = number(row[2], NAN);
        kernel.warps_percent = number(row[3], NAN), kernel.counted = whole(row[4]);
      }
    }
  }
  if (summary.rows.empty()) summary.absence = "No kernel ran in the selected range of steps.";
  return summary;
}

KernelLaunches read_launches(const TraceReader& reader, const TimeSpan& span, int most) {
  KernelLaunches out;
  if (!has_rows(reader, "CUPTI_ACTIVITY_KIND_KERNEL")) return out;
  const bool launches = has_rows(reader, "KV_LAUNCH");
  SqlQuery query(
      reader.file(),
      fmt::format("SELECT k.start, k.end, s.value, k.streamId, {} FROM CUPTI_ACTIVITY_KIND_KERNEL k"
                  " JOIN StringIds s ON s.id = k.shortName {} WHERE {} ORDER BY k.start LIMIT {}",
                  launches ? "l.layer, l.modelled_bytes" : "NULL, NULL",
                  launches ? "LEFT JOIN KV_LAUNCH l ON l.kernel = k.rowid" : "", in_span(span, "k.start"),
                  most + 1));
  std::map<std::string, int> names;
  for (std::vector<SqlValue> row; query.next(row);) {
    if (static_cast<int>(out.launches.size()) == most) {
      out.cut = true;
      break;
    }
    const auto [found, added] = names.try_emplace(text(row[2]), static_cast<int>(out.names.size()));
    if (added) out.names.push_back(found->first);
    out.launches.push_back({.start_ns = whole(row[0]),
                            .end_ns = whole(row[1]),
                            .name = found->second,
                            .layer = static_cast<int>(whole(row[4], -1)),
                            .stream = static_cast<int>(whole(row[3])),
                            .modelled_bytes = number(row[5], NAN)});
  }
  return out;
}

DramTimeline read_dram(const TraceReader& reader, int sequence) {
  DramTimeline dram;
  if (!has_rows(reader, "KV_DRAM_SAMPLE")) {
    dram.absence = counters_absence(reader);
    if (dram.absence.empty()) dram.absence = "only single kernels were counted; record with --counters dram";
    return dram;
  }
  const std::vector<TraceStep> steps = reader.steps(sequence, 0, reader.n_steps(sequence));
  std::vector<double> bytes(steps.size(), 0);
  SqlQuery query(
      reader.file(),
      "SELECT start_ns, end_ns, read_bytes + write_bytes FROM KV_DRAM_SAMPLE WHERE end_ns > start_ns "
      "ORDER BY start_ns");
  size_t first = 0;
  for (std::vector<SqlValue> row; query.next(row);) {
    const int64_t start = whole(row[0]), end = whole(row[1]);
    const auto end_of = [&](size_t i) { return steps[i].summary.start_ns + steps[i].summary.total_ns; };
    while (first < steps.size() && end_of(first) <= start) ++first;
    for (size_t i = first; i < steps.size() && steps[i].summary.start_ns < end; ++i) {
      const int64_t shared = std::min(end, end_of(i)) - std::max(start, steps[i].summary.start_ns);
      if (shared > 0)
        bytes[i] += number(row[2]) * static_cast<double>(shared) / static_cast<double>(end - start);
    }
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    dram.mib.push_back(static_cast<float>(bytes[i] / (1 << 20)));
    dram.gibps.push_back(static_cast<float>(
        bytes[i] / static_cast<double>(std::max<int64_t>(1, steps[i].summary.total_ns)) * 1e9 / (1 << 30)));
  }
  return dram;
}

std::vector<int64_t> phase_times(const TraceReader& reader, const std::vector<TraceStep>& steps,
                                 StepPhase phase) {
  std::vector<int64_t> times(steps.size());
  if (!has_rows(reader, "KV_LAUNCH") || !has_rows(reader, "CUPTI_ACTIVITY_KIND_KERNEL")) {
    for (size_t i = 0; i < steps.size(); ++i) times[i] = steps[i].summary.phase_ns[static_cast<int>(phase)];
    return times;
  }
  SqlQuery query(
      reader.file(),
      fmt::format("SELECT k.start, k.\"end\" FROM KV_LAUNCH l JOIN CUPTI_ACTIVITY_KIND_KERNEL k ON "
                  "k.rowid = l.kernel WHERE l.phase = '{}' ORDER BY k.start",
                  step_phase_name(phase)));
  size_t at = 0;
  for (std::vector<SqlValue> row; query.next(row);) {
    const int64_t start = whole(row[0]);
    while (at < steps.size() && steps[at].summary.start_ns + steps[at].summary.total_ns <= start) ++at;
    if (at == steps.size()) break;
    if (start >= steps[at].summary.start_ns) times[at] += whole(row[1]) - start;
  }
  return times;
}

std::vector<int> counted_steps(const TraceReader& reader, int sequence) {
  std::vector<int> positions;
  if (!has_rows(reader, "KV_KERNEL_COUNTER") || !has_rows(reader, "NVTX_EVENTS")) return positions;
  // A step's range on the decoding thread holds the beginning of the step's row.
  SqlQuery query(reader.file(),
                 fmt::format("SELECT DISTINCT k.step FROM KV_STEP k JOIN NVTX_EVENTS n ON "
                             "k.start_ns >= n.start AND k.start_ns < n.end WHERE k.sequence = {} AND "
                             "n.int64Value IN (SELECT step FROM KV_KERNEL_COUNTER) ORDER BY 1",
                             sequence));
  for (std::vector<SqlValue> row; query.next(row);) positions.push_back(static_cast<int>(whole(row[0])));
  return positions;
}

}  // namespace kvlapse
