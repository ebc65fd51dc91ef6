// Reads a results file as a comparison: the same policy and budget over all traces as paired samples, with
// confidence intervals, and the two questions that are asked of it: who is best at a budget, and which budget
// suffices.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "replay/results_file.h"
#include "replay/statistics.h"

namespace kvlapse {

struct ComparedMetric {
  Interval value;         // over the samples; low = high = mean for one sample
  bool in_noise = false;  // not distinguishable (95 %, paired) from the best policy of this budget
  bool best = false;
};

struct ComparedRow {
  std::string policy, budget, match;
  int budget_slots = 0;           // largest of the samples
  int n_samples = 0;              // sequences, over all traces
  std::vector<NamedValue> means;  // every metric, mean over the samples; peaks too
  ComparedMetric recall, output_error;
  // (this - oracle) / (random with pinned prompt - oracle) of missing mass: 0 as good as the oracle, 1 as bad
  // as chance; NaN without those rows at this budget.
  double regret = 0;
};

// One row per (policy, budget), policies by name, budgets ascending.
std::vector<ComparedRow> compare(const Results& results);

// The smallest budget of a policy whose metric stays below `most` with this confidence.
struct Choice {
  std::string policy, budget;  // budget "" when none suffices
  int budget_slots = 0;
  Interval value;
  int n_samples = 0;
  // 'sequences' when there are at least two, otherwise 'steps': blocks of consecutive steps of the one
  // sequence, which says nothing about other sequences.
  std::string basis;
};
// `metric`: output_error, recall or any name of summarise; where more is better (recall), stays above
// instead. Throws UsageError for an unknown one. Results with details.
std::vector<Choice> choose_budgets(const Results& results, std::string_view metric, double most,
                                   double confidence);

}  // namespace kvlapse
