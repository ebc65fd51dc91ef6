// Conformance: our policies against golden vectors, what a reference implementation kept of given q, k, v,
// step by step. A file holds groups of tensors named <policy>_<reference>.<field>; which policy stands behind
// a group is listed here. Files without q, k, v take them from another file whose tensors have the SHA-256 of
// their metadata. The layout is documented in tests/data/README.md. Not thread-safe.
//
// Each step starts from what the reference kept at the one before: a difference is counted once and does not
// spread.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/model/tensor_file.h"

namespace kvlapse {

struct ConformanceRow {
  std::string file, policy, reference;
  int64_t steps = 0;
  int64_t kept_mismatches = 0;             // positions kept by one side only, at a score that is no tie
  int64_t ties = 0;                        // positions that differ where scores are equal to 1e-6 relative
  std::optional<double> max_score_error;   // absolute, over slots that may be evicted
  std::optional<double> max_output_error;  // absolute, attention output
  std::string group;
};

struct ConformanceSkip {
  std::string file, group, why;
};

struct ConformanceReport {
  std::vector<ConformanceRow> rows;
  std::vector<ConformanceSkip> skipped;
};

// True when the file holds policy vectors (and not a model's).
bool has_policy_vectors(const TensorFile& file);

// Checks every group of `file`. `all` are the files that may hold its q, k, v. Groups named decoding_* are
// records of what kvpress's DecodingPress does, in its own slot order: skipped unless `decoding`.
void check_policy_vectors(const TensorFile& file, const std::vector<const TensorFile*>& all, bool decoding,
                          ConformanceReport& report);

}  // namespace kvlapse
