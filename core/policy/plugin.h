// Plug-ins: policies from a shared library with the C interface of plugin_abi.h. A library stays loaded until
// the process ends; loading it twice gives the same one. A crash inside a plug-in ends the process with a
// line that names it and exit code 2: the first load installs handlers for that. Thread-safe.
#pragma once

#include <memory>

#include "core/policy/policy.h"
#include "core/policy/spec.h"

namespace kvlapse {

// True when a spec's name is a path to a library: it holds a '/' and ends in .so.
bool is_plugin_name(std::string_view name);

// Default description of a plug-in; `name` is the path as written. Throws Error when the library cannot be
// loaded, lacks the symbol, was built for another version or describes itself badly.
PolicyInfo plugin_info(std::string_view path);
std::unique_ptr<Policy> make_plugin(PolicyInfo info);

}  // namespace kvlapse
