// A decode step allocates nothing: counted by replacing operator new for this test binary.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "core/engine/decode_session.h"
#include "kernels/cpu/cpu_backend.h"

namespace {
std::atomic<long> allocations{0};

void* counted(std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* p = std::malloc(size ? size : 1)) return p;
  throw std::bad_alloc();
}
}  // namespace

void* operator new(std::size_t size) {
  return counted(size);
}
void* operator new[](std::size_t size) {
  return counted(size);
}
// Not inlined: seeing free() beside a new expression, g++ would warn of a mismatch (it does under
// ThreadSanitizer).
[[gnu::noinline]] void operator delete(void* p) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete[](void* p) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete[](void* p, std::size_t) noexcept {
  std::free(p);
}

namespace kvlapse {
namespace {

TEST(Allocation, ADecodeStepAllocatesNothing) {
  const Model model = load_model(KVLAPSE_TEST_DATA "/tiny_qwen3");
  std::unique_ptr<Policy> policy = make_policy("full");
  std::unique_ptr<Backend> backend = make_cpu_backend(2);
  SessionOptions options;
  options.policy = policy.get();
  options.max_tokens = 100;
  DecodeSession session(*backend, model, options);
  for (int n : {5, 60}) session.add_sequence({std::vector<int32_t>(n, 3), 0, {}, 0});
  for (int i = 0; i < 3; ++i) session.step();
  const long before = allocations.load();
  for (int i = 0; i < 90; ++i) session.step();
  EXPECT_EQ(allocations.load() - before, 0);
}

}  // namespace
}  // namespace kvlapse
