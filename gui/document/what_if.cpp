#include "gui/document/what_if.h"

#include <fmt/format.h>
#include <unistd.h>

#include <system_error>

#include "replay/sweep.h"

namespace kvlapse::gui {

WhatIf::WhatIf(std::function<void()> wake)
    : wake_(std::move(wake)),
      results_(std::filesystem::temp_directory_path() / fmt::format("kvlapse-what-if-{}.kvr", getpid())) {}

WhatIf::~WhatIf() {
  cancelled_ = true;
  if (thread_.joinable()) thread_.join();
  std::error_code ignored;
  std::filesystem::remove(results_, ignored);
}

std::string WhatIf::message() const {
  const std::scoped_lock lock(mutex_);
  return message_;
}

bool WhatIf::start(const std::filesystem::path& trace, const WhatIfChoice& choice, bool shown) {
  if (running_) return false;
  if (thread_.joinable()) thread_.join();
  running_ = true;
  choice_ = choice;
  shown_ = shown;
  cancelled_ = false;
  progress_ = 0;
  {
    const std::scoped_lock lock(mutex_);
    message_.clear();
  }
  thread_ = std::thread([this, trace, choice] {
    std::string message;
    try {
      SweepOptions options;
      options.replay.threads = 1;  // the interface keeps a core
      Sweep sweep({trace}, parse_policy_list(choice.policy), parse_budget_list(choice.budget), options);
      ResultsFile results(results_, ResultsFile::Open::resume);
      sweep.run(results, [this](double done, double total) {
        progress_ = total > 0 ? done / total : 0;
        wake_();
        return !cancelled_;
      });
      results.finish();
    } catch (const Interrupted&) {
      message = "cancelled";
    } catch (const std::exception& error) {
      message = error.what();
    }
    {
      const std::scoped_lock lock(mutex_);
      message_ = message;
    }
    if (message.empty()) ++finished_;
    running_ = false;
    wake_();
  });
  return true;
}

}  // namespace kvlapse::gui
