// QualitySource: what the open results say about a trace under one policy and budget. Any thread; results
// files are read once and again when they change.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "gui/document/trace_source.h"
#include "gui/document/what_if.h"
#include "replay/views/replayed_quality.h"

namespace kvlapse::gui {

struct QualityAnswer {
  std::shared_ptr<const ReplayedQuality> quality;  // null: `why` says what is missing
  std::string why;
};

class QualitySource {
 public:
  // Under `choice`; with an empty one, under the policy and budget of the recording itself.
  QualityAnswer find(const TraceSource& trace, const std::vector<std::filesystem::path>& results,
                     const WhatIfChoice& choice);

 private:
  struct Loaded {
    std::filesystem::file_time_type written;
    std::shared_ptr<const Results> results;
  };
  std::shared_ptr<const Results> load(const std::filesystem::path& file);

  std::mutex mutex_;
  std::map<std::filesystem::path, Loaded> loaded_;
};

}  // namespace kvlapse::gui
