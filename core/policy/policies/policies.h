// Declarations of every policy's catalogue entry and factory, one pair per file of this folder.
#pragma once

#include <memory>

#include "core/policy/policy.h"

namespace kvlapse {

PolicyInfo full_info();
std::unique_ptr<Policy> make_full(PolicyInfo info);

PolicyInfo streaming_llm_info();
std::unique_ptr<Policy> make_streaming_llm(PolicyInfo info);

PolicyInfo random_info();
std::unique_ptr<Policy> make_random(PolicyInfo info);

PolicyInfo longflow_info();
std::unique_ptr<Policy> make_longflow(PolicyInfo info);

}  // namespace kvlapse
