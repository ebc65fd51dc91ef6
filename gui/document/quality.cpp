#include "gui/document/quality.h"

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/policy/spec.h"

namespace kvlapse::gui {

std::shared_ptr<const Results> QualitySource::load(const std::filesystem::path& file) {
  const auto written = std::filesystem::last_write_time(file);
  const std::scoped_lock lock(mutex_);
  Loaded& entry = loaded_[file];
  if (!entry.results || entry.written != written)
    entry = {written, std::make_shared<const Results>(read_results(file, true))};
  return entry.results;
}

QualityAnswer QualitySource::find(const TraceSource& trace, const std::vector<std::filesystem::path>& results,
                                  const WhatIfChoice& choice) {
  const TraceHeader& header = trace.reader().header();
  const bool own = choice.policy.empty();
  if (own && header.budget_slots <= 0)
    return {nullptr,
            "nothing was evicted; choose a row in Compare or run a What if to see it under that policy"};
  const std::string wanted = own ? header.policy.spec : choice.policy;
  const std::string budget = own ? header.budget_text : choice.budget;
  std::string policy = wanted;
  try {
    policy = canonical_spec(*make_policy(wanted));
  } catch (const std::exception&) {
    // A plug-in that is not loaded here: its name as written.
  }
  if (!results.empty()) {
    const std::string hash = trace.reader().content_hash();
    for (const auto& file : results) {
      if (auto found = find_quality(*load(file), hash, header.geometry, policy, budget)) {
        found->file = file.filename().string();
        return {std::make_shared<const ReplayedQuality>(std::move(*found)), {}};
      }
    }
  }
  if (header.tier != TraceTier::qkv)
    return {nullptr,
            fmt::format("a replay needs q, k and v, and this trace has tier {}; record with --tier qkv",
                        tier_name(header.tier))};
  return {
      nullptr,
      own ? fmt::format("a run that evicts does not see what it evicted; run What if with {} at {}, or open "
                        "results of a replay of this trace",
                        wanted, budget)
          : fmt::format("no open results hold {} at {} for this trace", wanted, budget)};
}

}  // namespace kvlapse::gui
