// trace_child FILE STEPS [MOST_BYTES]: writes a synthetic trace, a millisecond a step, and prints how many
// steps are committed. MOST_BYTES: no file may grow beyond that, as on a full disk. Prints "error: ..." and
// exits 2 when the trace cannot go on.
#include <signal.h>
#include <sys/resource.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "core/base/error.h"
#include "tests/support/trace/synthetic_trace.h"

int main(int argc, char** argv) {
  using namespace kvlapse;
  if (argc < 3) return 64;
  if (argc > 3) {
    signal(SIGXFSZ, SIG_IGN);
    const auto most = static_cast<rlim_t>(std::atoll(argv[3]));
    const rlimit limit{most, most};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  test::SyntheticProcess process;
  process.geometry.n_layers = 3;
  process.geometry.head_dim = 16;
  process.n_steps = std::atoi(argv[2]);
  process.budget = 100;
  int64_t reported = -1;
  try {
    TraceWriter writer(argv[1], process.header(),
                       {.packers = 4, .commit_interval = std::chrono::milliseconds(5)});
    test::SyntheticRun run(writer, process);
    while (run.step()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (const int64_t committed = writer.stats().committed_steps; committed != reported) {
        std::printf("%lld\n", static_cast<long long>(committed));
        std::fflush(stdout);
        reported = committed;
      }
    }
    run.end("max_tokens");
    writer.finish(/*interrupted=*/false);
  } catch (const Error& error) {
    std::printf("error: %s\n", error.what());
    return 2;
  }
  return 0;
}
