// Ctrl-C: the first asks the running work to end cleanly (the file stays valid and says that it was
// interrupted), the second kills the process.
#pragma once

#include <atomic>

namespace kvlapse::cli {

void install_interrupt_handler();
const std::atomic<bool>& interrupted();

}  // namespace kvlapse::cli
