#include "core/policy/registry.h"

#include "core/policy/policies/policies.h"

namespace kvlapse {

std::span<const PolicyEntry> policy_registry() {
  static constexpr PolicyEntry kEntries[] = {
      {full_info, make_full},
      {streaming_llm_info, make_streaming_llm},
      {random_info, make_random},
      {longflow_info, make_longflow},
  };
  return kEntries;
}

}  // namespace kvlapse
