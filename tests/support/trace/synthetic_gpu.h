// Rows of GPU activity in a finished synthetic trace, in the tables of trace/FORMAT.md: two kernels a layer
// and step, DRAM samples, counters of one step. Made up; for tests of whoever reads them.
#pragma once

#include <filesystem>

namespace kvlapse::test {

inline constexpr int64_t kAttentionBytes = 1'000'000;  // modelled, a launch
inline constexpr double kBytesRatio = 1.02;            // counted over modelled
inline constexpr int64_t kSampleBytes = 4'000'000;     // DRAM bytes of a step, read and written

void add_gpu_rows(const std::filesystem::path& trace, int n_layers);

}  // namespace kvlapse::test
