// GPU activity for a synthetic process, through the real writer: for every timed step the kernels of each
// layer on two streams, DRAM samples, counters of one step, a described device. Made up and labelled so
// ("synthetic GPU"); the times are those that an H100 would need for the bytes. For tests of whoever reads
// such rows, and for looking at the panels that show them.
#pragma once

#include "tests/support/trace/synthetic_trace.h"

namespace kvlapse::test {

inline constexpr int kGpuKernelsOfLayer = 4;
inline constexpr int kCountedStep = 3;       // ordinal of the step whose kernels are counted
inline constexpr double kBytesRatio = 1.02;  // counted over modelled
inline constexpr double kDramGbps = 3000, kPeakGbps = 3350;

SyntheticProcess with_gpu(SyntheticProcess process);
// Of one launch of the attention kernel that sees so many tokens of every kv head.
int64_t synthetic_attention_bytes(const SyntheticProcess& process, int64_t held_tokens);
double synthetic_attention_ns(const SyntheticProcess& process, int64_t held_tokens);

}  // namespace kvlapse::test
