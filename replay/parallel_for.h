// A loop over indices on oneTBB's threads.
#pragma once

#include <tbb/parallel_for.h>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace kvlapse {

// body(i) for every i of [begin, end), each a task of its own, in any order and at the same time; returns
// when all have returned. Every body sees what the caller wrote before, the caller sees what the bodies
// wrote. ThreadSanitizer cannot know that, since Debian's libtbb is not instrumented: for it the two edges
// are stated.
template <typename Index, typename Body>
void parallel_for(Index begin, Index end, const Body& body) {
#if defined(__SANITIZE_THREAD__)
  char fork = 0, join = 0;
  __tsan_release(&fork);
  const auto task = [&](Index i) {
    __tsan_acquire(&fork);
    body(i);
    __tsan_release(&join);
  };
#else
  const Body& task = body;
#endif
  tbb::parallel_for(begin, end, Index{1}, task, tbb::simple_partitioner());
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&join);
#endif
}

}  // namespace kvlapse
