// The catalogue of policies: an explicit list, one line each. Help, sweeps, pickers and conformance follow
// from it.
#pragma once

#include <memory>
#include <span>

#include "core/policy/policy.h"
#include "core/policy/spec.h"

namespace kvlapse {

struct PolicyEntry {
  // Catalogue entry with default parameters. Entries of one name stand together, the bare name's meaning
  // first.
  PolicyInfo (*info)();
  // `info` comes with resolved parameters and rule.
  std::unique_ptr<Policy> (*make)(PolicyInfo info);
  // The entry for these options, when they decide which parameters there are (adakv:base=...); otherwise
  // null.
  PolicyInfo (*specialise)(const PolicySpec& spec) = nullptr;
};

std::span<const PolicyEntry> policy_registry();

}  // namespace kvlapse
