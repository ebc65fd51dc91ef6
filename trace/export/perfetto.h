// A trace's steps as Chrome trace events (JSON), which Perfetto and chrome://tracing open: one slice a step
// with its measured phases as arguments, and counters of held and evicted tokens. Phases have durations but
// no start of their own, so they are no slices. Throws Error naming the file.
#pragma once

#include <filesystem>

#include "trace/trace_reader.h"

namespace kvlapse {

void export_chrome_trace(const TraceReader& trace, const std::filesystem::path& file);

}  // namespace kvlapse
