// The random numbers of the task generators: SplitMix64 with unbiased integer draws, written out here so that
// a (family, seed, size) gives the same problem with every compiler and standard library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace kvlapse {

class TaskRng {
 public:
  explicit TaskRng(uint64_t state) : state_(state) {}

  // One independent stream per (family, seed, size).
  static TaskRng for_problem(std::string_view family, uint64_t seed, int size) {
    uint64_t h = 0xcbf29ce484222325ull;  // FNV-1a
    for (char c : family) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
    TaskRng rng(h);
    rng.state_ = rng.next() ^ seed;
    rng.state_ = rng.next() ^ static_cast<uint64_t>(size);
    return rng;
  }

  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }

  // Uniform in [0, n), n > 0. Draws that would favour the low values are thrown away.
  uint64_t below(uint64_t n) {
    const uint64_t limit = ~0ull - (~0ull % n + 1) % n;  // largest value of the last whole multiple of n
    uint64_t x = next();
    while (x > limit) x = next();
    return x % n;
  }

  // Uniform in [low, high], both included.
  int between(int low, int high) {
    return low + static_cast<int>(below(static_cast<uint64_t>(high - low) + 1));
  }

  // True with probability percent/100.
  bool chance(int percent) { return between(1, 100) <= percent; }

  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }

  // `count` distinct integers of [low, high] in random order.
  std::vector<int> distinct(int low, int high, int count) {
    std::vector<int> all;
    for (int x = low; x <= high; ++x) all.push_back(x);
    shuffle(all);
    all.resize(static_cast<size_t>(count));
    return all;
  }

 private:
  uint64_t state_;
};

}  // namespace kvlapse
