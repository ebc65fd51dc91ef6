#include "replay/comparison.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <tuple>

#include "core/base/error.h"
#include "core/policy/spec.h"

namespace kvlapse {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int kStepBlock = 8;  // series bins that are resampled together

using Key = std::tuple<std::string, std::string, std::string>;  // policy, budget, match
struct Sample {
  std::string trace;
  size_t sequence;
  const std::vector<NamedValue>* values;
  const ResultCell* cell;
};
using Groups = std::map<Key, std::vector<Sample>>;

Groups group(const Results& results) {
  Groups groups;
  for (const ResultCell& cell : results.cells)
    for (size_t s = 0; s < cell.sequences.size(); ++s)
      groups[{cell.policy, cell.budget, cell.match}].push_back({cell.trace, s, &cell.sequences[s], &cell});
  for (auto& [key, samples] : groups)
    std::sort(samples.begin(), samples.end(), [](const Sample& a, const Sample& b) {
      return std::tie(a.trace, a.sequence) < std::tie(b.trace, b.sequence);
    });
  return groups;
}

std::vector<double> column(const std::vector<Sample>& samples, std::string_view metric) {
  std::vector<double> values;
  for (const Sample& s : samples) values.push_back(value_of(*s.values, metric));
  return values;
}

// Values of `a` and `b` over the samples that both have.
std::pair<std::vector<double>, std::vector<double>> paired(const std::vector<Sample>& a,
                                                           const std::vector<Sample>& b,
                                                           std::string_view metric) {
  std::pair<std::vector<double>, std::vector<double>> columns;
  for (const Sample& x : a)
    for (const Sample& y : b)
      if (x.trace == y.trace && x.sequence == y.sequence) {
        columns.first.push_back(value_of(*x.values, metric));
        columns.second.push_back(value_of(*y.values, metric));
      }
  return columns;
}

int most_slots(const std::vector<Sample>& samples) {
  int slots = 0;
  for (const Sample& s : samples) slots = std::max(slots, s.cell->budget_slots);
  return slots;
}

// Bounds are no candidates for the best: nothing is evicted, or the future is known.
bool is_bound(const std::string& policy) {
  return policy == "full" || policy.starts_with("oracle_");
}

void mark_best(std::vector<ComparedRow>& rows, const Groups& groups, std::string_view metric,
               ComparedMetric ComparedRow::*field) {
  const bool higher = higher_is_better(metric);
  std::map<std::pair<std::string, std::string>, std::vector<ComparedRow*>> by_budget;
  for (ComparedRow& row : rows)
    if (!is_bound(row.policy)) by_budget[{row.budget, row.match}].push_back(&row);
  for (auto& [budget, members] : by_budget) {
    ComparedRow* best =
        *std::min_element(members.begin(), members.end(), [&](const ComparedRow* a, const ComparedRow* b) {
          const double x = (a->*field).value.mean, y = (b->*field).value.mean;
          return higher ? x > y : x < y;
        });
    (best->*field).best = true;
    for (ComparedRow* row : members) {
      if (row == best || row->n_samples < 2) continue;
      const auto [a, b] = paired(groups.at({row->policy, row->budget, row->match}),
                                 groups.at({best->policy, best->budget, best->match}), metric);
      const Interval difference = bootstrap_difference(a, b);
      (row->*field).in_noise = a.size() >= 2 && difference.low <= 0 && difference.high >= 0;
    }
  }
}

double missing_mean(const ComparedRow* row) {
  return row ? 1.0 - value_of(row->means, "recall_mean") : kNan;
}

// Blocks of the steps of one sequence: means over layers and heads of a series.
std::vector<double> step_samples(const ResultCell& cell, std::string_view metric) {
  std::vector<double> bins(kSeriesBins), counts(kSeriesBins);
  for (const LayerSeries& series : cell.series) {
    if (series.metric != metric) continue;
    for (size_t i = 0; i < series.data.size(); ++i) {
      if (std::isnan(series.data[i])) continue;
      bins[i % kSeriesBins] += series.data[i];
      counts[i % kSeriesBins] += 1;
    }
  }
  std::vector<double> samples;
  for (size_t i = 0; i < bins.size(); ++i)
    if (counts[i] > 0) samples.push_back(bins[i] / counts[i]);
  return samples;
}

}  // namespace

std::vector<ComparedRow> compare(const Results& results) {
  const Groups groups = group(results);
  std::vector<ComparedRow> rows;
  for (const auto& [key, samples] : groups) {
    ComparedRow row;
    std::tie(row.policy, row.budget, row.match) = key;
    row.budget_slots = most_slots(samples);
    row.n_samples = static_cast<int>(samples.size());
    for (const NamedValue& v : *samples[0].values)
      row.means.push_back({v.name, bootstrap_mean(column(samples, v.name), 0.95).mean});
    row.recall.value = bootstrap_mean(column(samples, "recall_mean"));
    row.output_error.value = bootstrap_mean(column(samples, "output_error_mean"));
    rows.push_back(std::move(row));
  }
  std::sort(rows.begin(), rows.end(), [](const ComparedRow& a, const ComparedRow& b) {
    return std::tie(a.policy, a.budget_slots, a.match) < std::tie(b.policy, b.budget_slots, b.match);
  });
  mark_best(rows, groups, "recall_mean", &ComparedRow::recall);
  mark_best(rows, groups, "output_error_mean", &ComparedRow::output_error);
  for (ComparedRow& row : rows) {
    const ComparedRow *random = nullptr, *oracle = nullptr;
    for (const ComparedRow& other : rows) {
      if (other.budget != row.budget || other.match != row.match) continue;
      if (other.policy.starts_with("random") && other.policy.find("pin_prompt=1") != std::string::npos)
        random = &other;
      if (other.policy.starts_with("oracle_mass")) oracle = &other;
    }
    row.regret = (missing_mean(&row) - missing_mean(oracle)) / (missing_mean(random) - missing_mean(oracle));
  }
  return rows;
}

std::vector<Choice> choose_budgets(const Results& results, std::string_view metric, double most,
                                   double confidence) {
  const Groups groups = group(results);
  std::map<std::string, std::vector<const Groups::value_type*>> by_policy;
  for (const auto& entry : groups) by_policy[std::get<0>(entry.first)].push_back(&entry);
  const std::string_view column_name = metric == "output_error" ? "output_error_mean"
                                       : metric == "recall"     ? "recall_mean"
                                                                : metric;

  std::vector<Choice> choices;
  for (auto& [policy, entries] : by_policy) {
    if (policy == "full") continue;
    std::sort(entries.begin(), entries.end(),
              [](const auto* a, const auto* b) { return most_slots(a->second) < most_slots(b->second); });
    Choice choice;
    choice.policy = policy;
    for (const auto* entry : entries) {
      const std::vector<Sample>& samples = entry->second;
      std::vector<double> values = column(samples, column_name);
      if (std::isnan(values.at(0))) {
        std::vector<std::string_view> known = {"output_error", "recall"};
        for (const NamedValue& v : *samples[0].values) known.push_back(v.name);
        fail_usage("choose: unknown metric '{}'{}", metric, suggest(metric, known));
      }
      choice.n_samples = static_cast<int>(samples.size());
      choice.basis = "sequences";
      // One-sided: the upper end of a two-sided interval of 1 - 2 (1 - confidence).
      const double two_sided = 1 - 2 * (1 - confidence);
      Interval value = bootstrap_mean(values, two_sided);
      if (values.size() < 2) {
        choice.basis = "steps";
        const std::string_view series = column_name == "recall_mean"         ? "recall"
                                        : column_name == "output_error_mean" ? "output_error"
                                                                             : "";
        const std::vector<double> steps = step_samples(*samples[0].cell, series);
        if (steps.empty())
          fail(
              "choose: metric {}: one sequence only, and no series over its steps: expected recall, "
              "output_error or more traces",
              metric);
        const Interval spread = bootstrap_mean(steps, two_sided, kStepBlock);
        value.low += spread.low - spread.mean;
        value.high += spread.high - spread.mean;
      }
      choice.value = value;
      const bool below = higher_is_better(column_name) ? value.low > most : value.high < most;
      if (!below) continue;
      choice.budget = std::get<1>(entry->first);
      choice.budget_slots = most_slots(samples);
      break;
    }
    choices.push_back(std::move(choice));
  }
  std::stable_sort(choices.begin(), choices.end(), [](const Choice& a, const Choice& b) {
    const bool a_none = a.budget.empty(), b_none = b.budget.empty();
    return a_none != b_none ? b_none : a.budget_slots < b.budget_slots;
  });
  return choices;
}

}  // namespace kvlapse
