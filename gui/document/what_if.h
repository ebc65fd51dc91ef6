// WhatIf: replays the open trace under another policy and budget on a thread of its own. One run at a time;
// finished runs collect in one results file of this session. Members are called on the UI thread, except
// where said.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace kvlapse::gui {

// What the life map shows beside the recording.
struct WhatIfChoice {
  std::string policy, budget;  // as on the command line; "": none
  bool operator==(const WhatIfChoice&) const = default;
};

class WhatIf {
 public:
  explicit WhatIf(std::function<void()> wake);
  ~WhatIf();  // cancels
  WhatIf(const WhatIf&) = delete;
  WhatIf& operator=(const WhatIf&) = delete;

  // False while another run is going on. Both may be lists; `shown`: the panels show it once it is there.
  bool start(const std::filesystem::path& trace, const WhatIfChoice& choice, bool shown = true);
  void cancel() { cancelled_ = true; }
  bool running() const { return running_; }
  double progress() const { return progress_; }    // 0 to 1
  std::string message() const;                     // of the last run: "" or why it failed
  WhatIfChoice choice() const { return choice_; }  // of the last run
  bool shown() const { return shown_; }            // of the last run
  int finished() const { return finished_; }       // counts finished runs
  const std::filesystem::path& results() const { return results_; }

 private:
  std::function<void()> wake_;
  std::filesystem::path results_;
  WhatIfChoice choice_;
  bool shown_ = true;
  std::thread thread_;
  std::atomic<bool> running_{false}, cancelled_{false};
  std::atomic<double> progress_{0};
  std::atomic<int> finished_{0};
  mutable std::mutex mutex_;
  std::string message_;
};

}  // namespace kvlapse::gui
