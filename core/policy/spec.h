// Policy specs as users write them: name[@reference][:key=value...]. Keys are a policy's own parameters, or
// those that every policy has because the evictor owns them: pin_prompt recent gqa cadence cast ties
// granularity.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/policy/policy.h"

namespace kvlapse {

struct PolicySpec {
  std::string name;
  std::string reference;                                     // empty: the bare name's meaning
  std::vector<std::pair<std::string, std::string>> options;  // in the order written
};

// Throws UsageError on bad syntax.
PolicySpec parse_policy_spec(std::string_view text);
// Splits a comma-separated list of specs.
std::vector<PolicySpec> parse_policy_list(std::string_view text);

// Builds the policy; unknown names, keys and values out of range throw UsageError and offer the nearest ones.
std::unique_ptr<Policy> make_policy(const PolicySpec& spec);
std::unique_ptr<Policy> make_policy(std::string_view spec);

// The spec with its reference and every option that differs from the default, canonical order: equal text
// means equal behaviour for one version of the policy. What traces and results store.
std::string canonical_spec(const Policy& policy);

// A budget as written: "512" slots, or "25%" of the sequence that the full cache would hold at the end.
struct Budget {
  double value = 0;
  bool is_share = false;
  // Slots for a sequence of `total_tokens`; a share rounds to nearest, at least 1.
  int slots(int total_tokens) const;
  std::string text() const;
};
Budget parse_budget(std::string_view text);
std::vector<Budget> parse_budget_list(std::string_view text);

// Closest of `known` by edit distance, for messages: " (did you mean 'x' or 'y'?)", or "".
std::string suggest(std::string_view word, const std::vector<std::string_view>& known);

}  // namespace kvlapse
