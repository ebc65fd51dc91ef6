// A progress line on stderr with rate and time left, at most ten times a second, only on a terminal and
// without -q. update() may be called from any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <mutex>
#include <string>
#include <string_view>

namespace kvlapse::cli {

class Progress {
 public:
  // total 0: unknown. `unit` is what is counted, as in "tok" or "cells".
  Progress(std::string title, double total, std::string unit, bool enabled);
  ~Progress();
  void update(double done, std::string_view note = {});
  void finish();  // erases the line

 private:
  using Clock = std::chrono::steady_clock;
  std::string title_, unit_;
  double total_;
  bool enabled_;
  Clock::time_point start_, next_;
  std::mutex mutex_;
  bool drawn_ = false;
};

bool stderr_is_terminal();
std::string format_bytes(double bytes);      // 1.5 GiB
std::string format_seconds(double seconds);  // 1:05

}  // namespace kvlapse::cli
