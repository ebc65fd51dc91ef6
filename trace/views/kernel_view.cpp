#include "trace/views/kernel_view.h"

#include "core/base/error.h"
#include "trace/sql.h"

namespace kvlapse {
namespace {

std::string meta_value(const TraceReader& reader, const std::string& key) {
  const auto meta = reader.meta();
  const auto found = meta.find(key);
  return found == meta.end() ? std::string() : found->second;
}

double number(const SqlValue& value) {
  if (const auto* whole = std::get_if<int64_t>(&value)) return static_cast<double>(*whole);
  if (const auto* real = std::get_if<double>(&value)) return *real;
  return 0;
}

int64_t count(const TraceReader& reader, std::string_view sql) {
  SqlQuery query(reader.file(), sql);
  std::vector<SqlValue> row;
  return query.next(row) ? static_cast<int64_t>(number(row[0])) : 0;
}

}  // namespace

std::string counters_absence(const TraceReader& reader) {
  for (const GpuSource& source : reader.gpu_sources())
    if (!source.reason.empty()) return source.name + ": " + source.reason + "; " + source.advice;
  const std::string device = meta_value(reader, "device");
  const std::string wanted = meta_value(reader, "counters");
  if (device.find("cuda") == std::string::npos && device.find("NVIDIA") == std::string::npos)
    return "recorded on " + (device.empty() ? std::string("a device without GPU counters") : device) +
           "; GPU counters need --device cuda --counters dram or kernels";
  return "counters were not asked for (" + (wanted.empty() ? std::string("none") : wanted) +
         "); record with --counters dram or kernels";
}

KernelSummary read_kernels(const TraceReader& reader) {
  KernelSummary summary;
  const char* kTable = "SELECT count(*) FROM sqlite_master WHERE name = 'CUPTI_ACTIVITY_KIND_KERNEL'";
  if (count(reader, kTable) == 0 || count(reader, "SELECT count(*) FROM CUPTI_ACTIVITY_KIND_KERNEL") == 0) {
    summary.absence = "No kernels in this trace: " + counters_absence(reader) + ".";
    return summary;
  }
  SqlQuery query(reader.file(),
                 "SELECT s.value, count(*), sum(k.end - k.start) * 1e-6, avg(k.end - k.start) * 1e-3,"
                 " min(k.end - k.start) * 1e-3, max(k.end - k.start) * 1e-3, sum(l.modelled_bytes),"
                 " (SELECT avg(c.bytes_ratio) FROM KV_KERNEL_COUNTER c WHERE c.launch = l.launch)"
                 " FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.shortName"
                 " LEFT JOIN KV_LAUNCH l ON l.kernel = k.rowid GROUP BY s.value ORDER BY 3 DESC");
  for (std::vector<SqlValue> row; query.next(row);) {
    const auto* name = std::get_if<std::string>(&row[0]);
    summary.rows.push_back({name != nullptr ? *name : "?", static_cast<int64_t>(number(row[1])),
                            number(row[2]), number(row[3]), number(row[4]), number(row[5]), number(row[6]),
                            number(row[7])});
  }
  return summary;
}

}  // namespace kvlapse
