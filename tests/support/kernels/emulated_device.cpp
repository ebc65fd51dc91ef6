#include "tests/support/kernels/emulated_device.h"

#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <vector>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/fp8.h"
#include "core/base/rng.h"

namespace kvlapse::device {
namespace {

constexpr int kBlockShift = 20;  // a shared address is (block + 1) << 20 | offset
constexpr size_t kStackBytes = 96 * 1024;

struct Barrier {
  uint32_t expected = 0;
  int64_t pending = 0, bytes = 0;
  uint32_t phase = 0;
};

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<unsigned char[]> stack;
  int block = 0, thread = 0;
  bool done = false;
  int cluster_rounds = 0;                    // barriers of the cluster that it has waited for
  std::function<bool()> ready;               // empty: can run
  std::deque<std::function<void()>> copies;  // copy_async of this thread, in order
  std::vector<unsigned char> exchanged;
};

struct Warp {
  int arrived = 0;
  uint64_t rounds = 0;
  const char* operation = nullptr;
  std::vector<unsigned char> values[2];
};

struct NamedBarrier {
  int arrived = 0;
  uint64_t rounds = 0;
};

struct Machine {
  EmulatedLaunch launch;
  const std::function<void(unsigned char*)>* body = nullptr;
  ucontext_t scheduler{};
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<unsigned char[]>> smem_memory;
  std::vector<unsigned char*> smem;
  std::map<SmemAddress, Barrier> barriers;
  std::map<std::pair<int, int>, NamedBarrier> named;
  std::vector<NamedBarrier> cluster_barriers;
  std::vector<std::function<void()>> pending;  // bulk copies and remote stores in flight
  std::vector<Fiber*> copying;                 // threads with copies in flight
  uint64_t random = 0;
  Fiber* current = nullptr;
  std::exception_ptr error;

  uint64_t next_random() { return random = mix64(random); }
};

Machine* machine = nullptr;

void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  Fiber* self = machine->current;
  self->ready = std::move(ready);
  swapcontext(&self->context, &machine->scheduler);
}

void fiber_main() {
  Fiber* self = machine->current;
  try {
    (*machine->body)(machine->smem[self->block]);
  } catch (...) {
    machine->error = std::current_exception();
  }
  self->done = true;
  swapcontext(&self->context, &machine->scheduler);
}

void settle(Barrier& bar) {
  if (bar.pending != 0 || bar.bytes != 0) return;
  ++bar.phase;
  bar.pending = bar.expected;
}

Barrier& barrier_at(SmemAddress at) {
  auto found = machine->barriers.find(at);
  if (found == machine->barriers.end()) fail("emulator: mbarrier at {:#x} was never initialised", at);
  return found->second;
}

void* pointer_in(SmemAddress at, int bytes) {
  const int block = static_cast<int>(at >> kBlockShift) - 1,
            offset = static_cast<int>(at & ((1u << kBlockShift) - 1));
  if (block < 0 || block >= machine->launch.n_blocks || offset + bytes > machine->launch.smem_bytes)
    fail("emulator: shared address {:#x} + {}: expected within {} bytes of a block", at, bytes,
         machine->launch.smem_bytes);
  if (offset % std::min(bytes, 16) != 0)
    fail("emulator: shared address {:#x}: expected alignment {}", at, bytes);
  return machine->smem[block] + offset;
}

void complete_bytes(SmemAddress bar, int bytes) {
  Barrier& b = barrier_at(bar);
  b.bytes -= bytes;
  settle(b);
}

// One late event: a copy in flight, or the oldest cp.async of some thread.
bool run_late_event() {
  Machine& m = *machine;
  const size_t n = m.pending.size() + m.copying.size();
  if (n == 0) return false;
  size_t pick = m.next_random() % n;
  if (pick < m.pending.size()) {
    auto event = std::move(m.pending[pick]);
    m.pending[pick] = std::move(m.pending.back());
    m.pending.pop_back();
    event();
  } else {
    pick -= m.pending.size();
    Fiber* f = m.copying[pick];
    // Some of this thread's copies, in order.
    for (uint64_t i = 0, burst = 1 + m.next_random() % 40; i < burst && !f->copies.empty(); ++i) {
      auto event = std::move(f->copies.front());
      f->copies.pop_front();
      event();
    }
    if (f->copies.empty()) {
      m.copying[pick] = m.copying.back();
      m.copying.pop_back();
    }
  }
  return true;
}

void schedule() {
  Machine& m = *machine;
  std::vector<int> order(m.fibers.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  size_t left = order.size();
  while (left > 0) {
    for (size_t i = left; i > 1; --i) std::swap(order[i - 1], order[m.next_random() % i]);
    bool ran = false;
    for (size_t i = 0; i < left; ++i) {
      Fiber& f = m.fibers[order[i]];
      if (f.ready && !f.ready()) continue;
      f.ready = nullptr;
      m.current = &f;
      swapcontext(&m.scheduler, &f.context);
      if (m.error) std::rethrow_exception(m.error);
      ran = true;
    }
    std::erase_if(order, [&](int i) { return m.fibers[i].done; });
    left = order.size();
    // Late events complete in bursts, and always when nobody can run; from odd seeds only then, so that what
    // has landed is used up while the rest, older copies too, is still in flight.
    bool late = false;
    const uint64_t burst = !ran ? 1 + m.next_random() % 4 : m.launch.seed % 2 == 1 ? 0 : m.next_random() % 4;
    for (uint64_t i = 0; i < burst; ++i) late |= run_late_event();
    if (!ran && !late && left > 0)
      fail("emulator: deadlock: {} threads wait for ever (seed {})", left, m.launch.seed);
  }
}

// A function of its own: getcontext may return twice, as far as compilers know.
void prepare(Fiber& f, int block, int thread) {
  f.block = block;
  f.thread = thread;
  f.stack.reset(new unsigned char[kStackBytes]);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
}

}  // namespace

void run_emulated(const EmulatedLaunch& launch, const std::function<void(unsigned char*)>& body) {
  Machine m;
  m.launch = launch;
  m.body = &body;
  m.random = mix64(launch.seed + 1);
  m.fibers = std::vector<Fiber>(static_cast<size_t>(launch.n_blocks) * launch.n_threads);
  m.warps = std::vector<Warp>(m.fibers.size() / 32);
  m.cluster_barriers.resize(launch.n_blocks / launch.cluster);
  for (int b = 0; b < launch.n_blocks; ++b) {
    m.smem_memory.emplace_back(new unsigned char[launch.smem_bytes + 1024]);
    auto at = reinterpret_cast<uintptr_t>(m.smem_memory.back().get());
    m.smem.push_back(reinterpret_cast<unsigned char*>((at + 1023) / 1024 * 1024));
    std::memset(m.smem.back(), 0xff, launch.smem_bytes);  // NaN
  }
  Machine* outer = machine;
  machine = &m;
  for (int b = 0, i = 0; b < launch.n_blocks; ++b)
    for (int t = 0; t < launch.n_threads; ++t, ++i) prepare(m.fibers[i], b, t);
  try {
    schedule();
  } catch (...) {
    machine = outer;
    throw;
  }
  machine = outer;
}

int thread_index() {
  return machine->current->thread;
}
namespace {
int linear_block() {
  return machine->current->block;
}
int columns() {
  return machine->launch.n_columns > 0 ? machine->launch.n_columns : machine->launch.n_blocks;
}
}  // namespace
int block_index() {
  return linear_block() % columns();
}
int block_count() {
  return columns();
}
int block_row() {
  return linear_block() / columns();
}
int block_rows() {
  return machine->launch.n_blocks / columns();
}
int lane_index() {
  return thread_index() % 32;
}

SmemAddress smem_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - machine->smem[linear_block()];
  if (offset < 0 || offset >= machine->launch.smem_bytes)
    fail("emulator: pointer outside this block's shared memory");
  return (static_cast<uint32_t>(linear_block() + 1) << kBlockShift) | static_cast<uint32_t>(offset);
}
void check_index(int i, int n) {
  if (i < 0 || i >= n)
    fail("emulator: block {} thread {}: index {} of an array of {}", linear_block(), thread_index(), i, n);
}
void* smem_pointer(SmemAddress at, int bytes) {
  if (static_cast<int>(at >> kBlockShift) - 1 != linear_block())
    fail("emulator: plain access to another block's memory");
  return pointer_in(at, bytes);
}

void mbarrier_init(SmemAddress bar, uint32_t count) {
  pointer_in(bar, 8);
  machine->barriers[bar] = Barrier{count, count, 0, 0};
}
void mbarrier_arrive(SmemAddress bar) {
  Barrier& b = barrier_at(bar);
  if (--b.pending < 0) fail("emulator: mbarrier at {:#x}: more arrivals than expected", bar);
  settle(b);
}
void mbarrier_arrive_expect(SmemAddress bar, uint32_t bytes) {
  barrier_at(bar).bytes += bytes;
  mbarrier_arrive(bar);
}
void mbarrier_wait(SmemAddress bar, uint32_t parity) {
  wait_until([=] { return (barrier_at(bar).phase & 1u) != parity; });
}

void bulk_load_tile(bool issues, SmemAddress to, const TensorMap* map, int y, int w, SmemAddress bar,
                    uint64_t) {
  if (!issues) return;
  const int row_bytes = map->box_x * map->element_bytes, box_bytes = 64 * row_bytes,
            boxes = map->nx / map->box_x;
  if ((to & 1023u) != 0) fail("emulator: bulk copy to {:#x}: expected a multiple of 1024", to);
  pointer_in(to + static_cast<uint32_t>(boxes * box_bytes) - 16, 16);
  machine->pending.push_back([=] {
    for (int at = 0; at < boxes * box_bytes; at += 16) {
      const int box = at / box_bytes, row = at % box_bytes / row_bytes;
      const auto in_box = static_cast<uint32_t>(at % box_bytes);
      const uint32_t swizzle = row_bytes == 128 ? 0x70u : row_bytes == 64 ? 0x30u : 0x10u;
      void* target =
          pointer_in(to + static_cast<uint32_t>(box * box_bytes) + (in_box ^ ((in_box >> 3) & swizzle)), 16);
      const size_t element = (static_cast<size_t>(w) * map->ny + y + row) * map->nx + box * map->box_x;
      if (y + row < map->ny)
        std::memcpy(
            target,
            static_cast<const unsigned char*>(map->base) + element * map->element_bytes + at % row_bytes, 16);
      else
        std::memset(target, 0, 16);
    }
    complete_bytes(bar, boxes * box_bytes);
  });
}
void bulk_load(SmemAddress to, const void* from, uint32_t bytes, SmemAddress bar, uint64_t) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("emulator: bulk copy of {} bytes from {}: expected multiples of 16", bytes, from);
  pointer_in(to, 16);
  machine->pending.push_back([=] {
    for (uint32_t i = 0; i < bytes; i += 16)
      std::memcpy(pointer_in(to + i, 16), static_cast<const unsigned char*>(from) + i, 16);
    complete_bytes(bar, static_cast<int>(bytes));
  });
}
namespace {
void push_copy(std::function<void()> event) {
  Fiber* self = machine->current;
  if (self->copies.empty()) machine->copying.push_back(self);
  self->copies.push_back(std::move(event));
}
void copy_async(SmemAddress to, const void* from, int bytes, bool valid) {
  pointer_in(to, bytes);
  push_copy([=] {
    if (valid)
      std::memcpy(pointer_in(to, bytes), from, bytes);
    else
      std::memset(pointer_in(to, bytes), 0, bytes);
  });
}
}  // namespace
void copy_async4(SmemAddress to, const void* from, bool valid) {
  copy_async(to, from, 4, valid);
}
void copy_async8(SmemAddress to, const void* from, bool valid) {
  copy_async(to, from, 8, valid);
}
void copy_async16(SmemAddress to, const void* from, bool valid) {
  copy_async(to, from, 16, valid);
}
void copy_async_arrive(SmemAddress bar) {
  push_copy([=] { mbarrier_arrive(bar); });
}

const void* warp_exchange(const char* operation, const void* value, int bytes) {
  Fiber* self = machine->current;
  Warp& warp =
      machine->warps[(static_cast<size_t>(self->block) * machine->launch.n_threads + self->thread) / 32];
  const uint64_t round = warp.rounds;
  std::vector<unsigned char>& values = warp.values[round % 2];
  if (warp.arrived == 0) {
    values.resize(static_cast<size_t>(bytes) * 32);
    warp.operation = operation;
  } else if (std::strcmp(warp.operation, operation) != 0) {
    fail("emulator: block {} warp {}: lanes diverge: '{}' meets '{}'", self->block, self->thread / 32,
         operation, warp.operation);
  }
  std::memcpy(values.data() + static_cast<size_t>(self->thread % 32) * bytes, value, bytes);
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.rounds;
  } else {
    wait_until([&warp, round] { return warp.rounds > round; });
  }
  self->exchanged.assign(values.begin(), values.end());
  return self->exchanged.data();
}

namespace {
void load_matrices(uint32_t (&r)[4], SmemAddress row, bool transposed) {
  const SmemAddress* rows = warp_exchange(transposed ? "ldmatrix.trans" : "ldmatrix", row);
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int line = transposed ? 2 * t + j : g, column = transposed ? g : 2 * t + j;
      pair[j] = static_cast<const uint16_t*>(smem_pointer(rows[m * 8 + line], 16))[column];
    }
    std::memcpy(&r[m], pair, 4);
  }
  warp_sync();  // nobody overwrites what another lane still reads
}
}  // namespace

void load_matrix4(uint32_t (&r)[4], SmemAddress row) {
  load_matrices(r, row, false);
}
void load_matrix4_transposed(uint32_t (&r)[4], SmemAddress row) {
  load_matrices(r, row, true);
}
uint32_t transpose_matrix(uint32_t r) {
  const uint32_t* all = warp_exchange("movmatrix", r);
  const int g = lane_index() / 4, t = lane_index() % 4;
  uint16_t pair[2];
  for (int j = 0; j < 2; ++j) {
    uint16_t source[2];
    std::memcpy(source, &all[(2 * t + j) * 4 + g / 2], 4);
    pair[j] = source[g % 2];
  }
  uint32_t out;
  std::memcpy(&out, pair, 4);
  return out;
}
template <>
uint32_t pack2<F16>(float low, float high) {
  return f32_to_f16(low) | static_cast<uint32_t>(f32_to_f16(high)) << 16;
}
template <>
uint32_t pack2<Bf16>(float low, float high) {
  return f32_to_bf16(low) | static_cast<uint32_t>(f32_to_bf16(high)) << 16;
}
template <>
void unpack2<F16>(uint32_t packed, float& low, float& high) {
  low = f16_to_f32(static_cast<uint16_t>(packed)), high = f16_to_f32(static_cast<uint16_t>(packed >> 16));
}
template <>
void unpack2<Bf16>(uint32_t packed, float& low, float& high) {
  low = bf16_to_f32(static_cast<uint16_t>(packed)), high = bf16_to_f32(static_cast<uint16_t>(packed >> 16));
}

namespace {
uint32_t widen(uint32_t bytes, int first, int second) {
  const auto half = [&](int i) -> uint32_t {
    return f32_to_f16(e4m3_to_f32(static_cast<uint8_t>(bytes >> (8 * i))));
  };
  return half(first) | half(second) << 16;
}
}  // namespace
void widen_e4m3(uint32_t bytes, uint32_t& low, uint32_t& high) {
  low = widen(bytes, 0, 1), high = widen(bytes, 2, 3);
}
void widen_e4m3_apart(uint32_t bytes, uint32_t& even, uint32_t& odd) {
  even = widen(bytes, 0, 2), odd = widen(bytes, 1, 3);
}

namespace {
void meet(NamedBarrier& bar, int n_threads) {
  const uint64_t round = bar.rounds;
  if (++bar.arrived == n_threads) {
    bar.arrived = 0;
    ++bar.rounds;
  } else {
    wait_until([&bar, round] { return bar.rounds > round; });
  }
}
}  // namespace

void named_barrier(int id, int n_threads) {
  meet(machine->named[{linear_block(), id}], n_threads);
}
void block_sync() {
  meet(machine->named[{linear_block(), 0}], machine->launch.n_threads);
}
void cluster_arrive() {
  ++machine->cluster_barriers[linear_block() / machine->launch.cluster].arrived;
}
void cluster_wait() {
  NamedBarrier& bar = machine->cluster_barriers[linear_block() / machine->launch.cluster];
  const int wanted = ++machine->current->cluster_rounds * machine->launch.cluster * machine->launch.n_threads;
  wait_until([&bar, wanted] { return bar.arrived >= wanted; });
}
SmemAddress remote_address(SmemAddress local, int rank) {
  const int first = linear_block() / machine->launch.cluster * machine->launch.cluster;
  return (static_cast<uint32_t>(first + rank + 1) << kBlockShift) | (local & ((1u << kBlockShift) - 1));
}
void remote_store(SmemAddress to, uint32_t v) {
  std::memcpy(pointer_in(to, 4), &v, 4);
}
void remote_add(SmemAddress to, int32_t v) {
  int32_t sum;
  std::memcpy(&sum, pointer_in(to, 4), 4);
  sum += v;
  std::memcpy(pointer_in(to, 4), &sum, 4);
}
void remote_store4(SmemAddress to, Float4 v, SmemAddress bar) {
  machine->pending.push_back([=] {
    std::memcpy(pointer_in(to, 16), &v, 16);
    complete_bytes(bar, 16);
  });
}

uint32_t count_arrival(uint32_t* counter, uint32_t last) {
  const uint32_t old = *counter;
  *counter = old >= last ? 0 : old + 1;
  return old;
}
void resident_barrier(uint32_t* word, int rank, int n) {
  const uint32_t add = rank == 0 ? 0x80000000u - static_cast<uint32_t>(n - 1) : 1u;
  const uint32_t old = *word;
  *word += add;
  wait_until([=] { return ((old ^ *word) & 0x80000000u) != 0; });
}
TaggedPair load_tagged(const uint64_t* pair, uint32_t tag) {
  wait_until([=] { return pair[0] >> 32 == tag && pair[1] >> 32 == tag; });
  return {{static_cast<uint32_t>(pair[0]), static_cast<uint32_t>(pair[1])}, {tag, tag}};
}

}  // namespace kvlapse::device
