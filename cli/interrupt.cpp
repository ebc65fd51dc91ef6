#include "cli/interrupt.h"

#include <csignal>

namespace kvlapse::cli {
namespace {

std::atomic<bool> stop{false};

void on_signal(int signal) {
  if (stop.exchange(true)) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
}

}  // namespace

void install_interrupt_handler() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
}

const std::atomic<bool>& interrupted() {
  return stop;
}

}  // namespace kvlapse::cli
