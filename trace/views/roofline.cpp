#include "trace/views/roofline.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdio>

#include "trace/sql.h"
#include "trace/views/kernel_view.h"

namespace kvlapse {
namespace {

double real(const SqlValue& value) {
  if (const auto* whole = std::get_if<int64_t>(&value)) return static_cast<double>(*whole);
  const auto* number = std::get_if<double>(&value);
  return number != nullptr ? *number : NAN;
}

bool has_table(const TraceReader& reader, std::string_view name) {
  SqlQuery tables(reader.file(), fmt::format("SELECT count(*) FROM sqlite_master WHERE name = '{}'", name));
  std::vector<SqlValue> row;
  return tables.next(row) && std::get<int64_t>(row[0]) > 0;
}

// Peaks of NVIDIA's data sheets, fp32 without tensor cores; the first that the device's name contains.
struct DataSheet {
  std::string_view device;
  double gflops, gbps;
};
constexpr std::array<DataSheet, 7> kDataSheets = {{{"H200", 66'900, 4800},
                                                   {"H100 PCIe", 51'200, 2039},
                                                   {"H100", 66'900, 3350},
                                                   {"A100-SXM4-80GB", 19'500, 2039},
                                                   {"A100 80GB PCIe", 19'500, 1935},
                                                   {"A100-SXM4-40GB", 19'500, 1555},
                                                   {"A100-PCIE-40GB", 19'500, 1555}}};

// fp32 lanes of a multiprocessor (CUDA C++ Programming Guide, "Arithmetic instructions"); 0: not known.
int fp32_lanes(int64_t major, int64_t minor) {
  if (major == 8) return minor == 0 ? 64 : 128;
  return major >= 9 ? 128 : 0;
}

// A multiply and an add in every lane and cycle, of the device that the profiler described.
void add_described_device(const TraceReader& reader, Roofline& roofline) {
  if (!has_table(reader, "TARGET_INFO_GPU")) return;
  SqlQuery query(
      reader.file(),
      "SELECT smCount, computeMajor, computeMinor, clockRate FROM TARGET_INFO_GPU WHERE smCount > 0 "
      "AND clockRate > 0 AND computeMajor IS NOT NULL AND computeMinor IS NOT NULL ORDER BY id");
  std::vector<SqlValue> row;
  if (!query.next(row)) return;
  const int lanes = fp32_lanes(std::get<int64_t>(row[1]), std::get<int64_t>(row[2]));
  if (lanes == 0) return;
  roofline.compute_gflops = {2.0 * lanes * real(row[0]) * real(row[3]) * 1e-9, Ceiling::Origin::derived,
                             fmt::format("{} multiprocessors x {} fp32 lanes x 2 x {:.0f} MHz", real(row[0]),
                                         lanes, real(row[3]) * 1e-6)};
}

// What the device's name alone tells.
void add_named_device(const TraceReader& reader, Roofline& roofline) {
  const auto meta = reader.meta();
  const auto device = meta.find("device");
  const std::string name = device == meta.end() ? std::string() : device->second;
  for (const DataSheet& sheet : kDataSheets) {
    if (name.find(sheet.device) == std::string::npos) continue;
    const std::string from = fmt::format("NVIDIA's data sheet of {}", sheet.device);
    if (!roofline.memory_gbps.known()) roofline.memory_gbps = {sheet.gbps, Ceiling::Origin::data_sheet, from};
    if (!roofline.compute_gflops.known())
      roofline.compute_gflops = {sheet.gflops, Ceiling::Origin::data_sheet, from + ", fp32"};
    break;
  }
  if (name.starts_with("cpu")) {
    const size_t comma = name.find(", ");
    if (comma != std::string::npos &&
        std::sscanf(name.c_str() + comma, ", %d thread", &roofline.cpu_threads) != 1)
      roofline.cpu_threads = 0;
  }
  if (!roofline.memory_gbps.known())
    roofline.memory_gbps.from = "not in this trace: on a GPU it comes with --counters kernels";
  if (!roofline.compute_gflops.known())
    roofline.compute_gflops.from =
        fmt::format("not known for the device of this trace ({})", name.empty() ? "none named" : name);
}

// Counted kernels whose launch we know to be attention, and the peak that their share of it implies.
void add_counted(const TraceReader& reader, double flop_per_modelled_byte, Roofline& roofline) {
  if (!has_table(reader, "KV_KERNEL_COUNTER")) return;
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
      roofline.memory_gbps = {dram / ns / (percent / 100), Ceiling::Origin::counted,
                              "counted DRAM bytes over the counted share of the peak"};
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
  const std::vector<TraceStep> steps = reader.steps(sequence, 0, reader.n_steps(sequence));
  const std::vector<int64_t> times = phase_times(reader, steps, StepPhase::attention);
  for (size_t i = 0; i < steps.size(); ++i) {
    const TraceStep& step = steps[i];
    if (const int64_t ns = times[i]; ns > 0)
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
  add_described_device(reader, roofline);
  add_named_device(reader, roofline);
  return roofline;
}

}  // namespace kvlapse
