// Every invariant and checksum of a trace, from the file alone. Thread-safe; reads only.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace kvlapse {

struct VerifyReport {
  std::vector<std::string> violations;  // one line each, without the file's name; empty: the trace is sound
  int64_t steps = 0, chunks = 0, evictions = 0;
  bool complete = false;
  bool ok() const { return violations.empty(); }
};

// Stops after `most` violations. A file that cannot be opened as a trace is a violation too, except one that
// does not exist: that throws Error.
VerifyReport verify_trace(const std::filesystem::path& file, int most = 20,
                          const std::function<void(int64_t, int64_t)>& progress = {});

}  // namespace kvlapse
