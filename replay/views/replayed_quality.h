// What a replay said about one trace, for views beside the recording: recall over the steps, and the error of
// each kv head. Read from a results file; the cell is found by the trace's content hash, the policy and the
// budget.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "replay/results_file.h"
#include "trace/trace_reader.h"

namespace kvlapse {

struct ReplayedQuality {
  std::string policy, budget, file;
  // [n_bins] means over layers and query heads; step t is in bin t * n_bins / T. NaN where a bin has no step.
  std::vector<float> recall, output_error;
  // [L][H] means over the group's query heads; NaN for layers that were not replayed.
  std::vector<float> head_recall, head_error;
};
// `results` with details. Empty when no cell fits.
std::optional<ReplayedQuality> find_quality(const Results& results, const std::string& content_hash,
                                            const CacheGeometry& geometry, const std::string& policy,
                                            const std::string& budget);

}  // namespace kvlapse
