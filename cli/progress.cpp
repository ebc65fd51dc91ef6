#include "cli/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>

namespace kvlapse::cli {

bool stderr_is_terminal() {
  return isatty(STDERR_FILENO) != 0;
}

std::string format_bytes(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024 && unit < 4) {
    bytes /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f} B", bytes) : fmt::format("{:.1f} {}", bytes, units[unit]);
}

std::string format_seconds(double seconds) {
  auto s = static_cast<long>(seconds + 0.5);
  return s < 3600 ? fmt::format("{}:{:02}", s / 60, s % 60)
                  : fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
}

Progress::Progress(std::string title, double total, std::string unit, bool enabled)
    : title_(std::move(title)),
      unit_(std::move(unit)),
      total_(total),
      enabled_(enabled && stderr_is_terminal()),
      start_(Clock::now()),
      next_(start_) {}

Progress::~Progress() {
  finish();
}

void Progress::update(double done, std::string_view note) {
  if (!enabled_) return;
  std::lock_guard lock(mutex_);
  Clock::time_point now = Clock::now();
  if (now < next_) return;
  next_ = now + std::chrono::milliseconds(100);
  double elapsed = std::chrono::duration<double>(now - start_).count();
  double rate = elapsed > 0 ? done / elapsed : 0;
  std::string line = fmt::format("{}  {:.0f}", title_, done);
  if (total_ > 0) line += fmt::format("/{:.0f} {} {:3.0f}%", total_, unit_, 100 * done / total_);
  line += fmt::format("  {:.1f} {}/s", rate, unit_);
  if (total_ > 0 && rate > 0) line += fmt::format("  ETA {}", format_seconds((total_ - done) / rate));
  if (!note.empty()) line += fmt::format("  {}", note);
  fmt::print(stderr, "\r\033[K{}", line);
  std::fflush(stderr);
  drawn_ = true;
}

void Progress::finish() {
  std::lock_guard lock(mutex_);
  if (drawn_) fmt::print(stderr, "\r\033[K");
  drawn_ = false;
}

}  // namespace kvlapse::cli
