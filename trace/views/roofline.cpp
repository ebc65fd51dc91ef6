#include "trace/views/roofline.h"

#include <fmt/format.h>

#include <algorithm>

#include "trace/sql.h"

namespace kvlapse {
namespace {

double real(const SqlValue& value) {
  if (const auto* whole = std::get_if<int64_t>(&value)) return static_cast<double>(*whole);
  const auto* number = std::get_if<double>(&value);
  return number != nullptr ? *number : NAN;
}

// Counted kernels whose launch we know to be attention, and the peak that their share of it implies.
void add_counted(const TraceReader& reader, double flop_per_modelled_byte, Roofline& roofline) {
  {
    SqlQuery tables(reader.file(), "SELECT count(*) FROM sqlite_master WHERE name = 'KV_KERNEL_COUNTER'");
    std::vector<SqlValue> row;
    if (!tables.next(row) || std::get<int64_t>(row[0]) == 0) return;
  }
  SqlQuery query(
      reader.file(),
      "SELECT launch, avg(modelled_bytes), avg(dram_read_bytes + dram_write_bytes), avg(duration_ns), "
      "avg(dram_percent) FROM KV_KERNEL_COUNTER WHERE phase = 'attention' AND duration_ns > 0 GROUP BY "
      "launch ORDER BY 4 DESC");
  double heaviest = 0;
  for (std::vector<SqlValue> row; query.next(row);) {
    const auto* name = std::get_if<std::string>(&row[0]);
    const double modelled = real(row[1]), dram = real(row[2]), ns = real(row[3]), percent = real(row[4]);
    if (!(modelled > 0) || !(dram > 0)) continue;
    const double flop = flop_per_modelled_byte * modelled;
    roofline.points.push_back({name != nullptr ? *name : "attention kernel", flop / dram, flop / ns, true});
    // The share of the largest kernel is the least rounded.
    if (percent > 1 && dram > heaviest) {
      heaviest = dram;
      roofline.ceiling_gbps = dram / ns / (percent / 100);
      roofline.ceiling_from = "counted DRAM bytes over the counted share of the peak";
    }
  }
}

}  // namespace

Roofline read_roofline(const TraceReader& reader, int sequence) {
  Roofline roofline;
  const CacheGeometry& geometry = reader.header().geometry;
  const double flop_per_token = 4.0 * geometry.head_dim * geometry.group();  // of one kv head
  const double flop_per_byte = flop_per_token / static_cast<double>(geometry.head_token_bytes());
  std::vector<double> gflops;
  for (const TraceStep& step : reader.steps(sequence, 0, reader.n_steps(sequence))) {
    const int64_t ns = step.summary.phase_ns[static_cast<int>(StepPhase::attention)];
    if (ns > 0)
      gflops.push_back(static_cast<double>(step.held_tokens + step.evicted_tokens) * flop_per_token /
                       static_cast<double>(ns));
  }
  if (gflops.empty()) {
    roofline.absence = "no step has a measured time of its attention";
    return roofline;
  }
  std::ranges::sort(gflops);
  for (const auto& [name, share] : {std::pair{"attention, fastest tenth of the steps", 0.9},
                                    {"attention, median step", 0.5},
                                    {"attention, slowest tenth", 0.1}}) {
    roofline.points.push_back({name, flop_per_byte,
                               gflops[static_cast<size_t>(share * static_cast<double>(gflops.size() - 1))],
                               false});
  }
  add_counted(reader, flop_per_byte, roofline);
  if (std::isnan(roofline.ceiling_gbps))
    roofline.ceiling_from =
        "the memory's ceiling is not in this trace: it comes with --counters kernels on a GPU";
  return roofline;
}

}  // namespace kvlapse
