#include "replay/alike_keys.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "core/base/rng.h"
#include "core/base/vector_math.h"
#include "core/policy/scoring/redundancy.h"

namespace kvlapse {
namespace {

// Against a plain search, over any slot order, with tokens missing and blocks that come in pieces.
TEST(AlikeKeys, FindTheLastSlotThatIsAlike) {
  constexpr int kTokens = 150, kHeads = 2, kDim = 8;
  constexpr float kThreshold = 0.5f;
  std::vector<float> keys(kHeads * kTokens * kDim), unit(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = unit_float(counter_random({4, i})) - 0.5f;
  for (size_t i = 0; i < keys.size(); i += kDim) unit_key({&keys[i], kDim}, &unit[i]);
  auto at = [&](int h, int pos) { return static_cast<size_t>((h * kTokens + pos) * kDim); };
  auto cosine = [&](int h, int a, int b) { return dot(&unit[at(h, a)], &unit[at(h, b)], kDim); };

  AlikeKeys alike({1, kHeads, kHeads, kDim, 0, DType::f32}, kTokens, kThreshold);
  int known = 0, none = 0, some = 0;
  for (int end : {5, 32, 40, 96, 97, 150}) {
    for (int h = 0; h < kHeads; ++h)
      for (int begin = known; begin < end;) {
        const int last = std::min(end, (begin / AlikeKeys::kBlock + 1) * AlikeKeys::kBlock);
        alike.add(h, begin, last, [&](int pos) { return &keys[at(h, pos)]; });
        begin = last;
      }
    known = end;
    for (int h = 0; h < kHeads; ++h) {
      std::vector<Pos> slots;  // two thirds of the tokens, shuffled
      for (int pos = 0; pos < end; ++pos)
        if (mix64(static_cast<uint64_t>(pos) * 7 + h) % 3 != 0) slots.push_back(Pos{pos});
      std::sort(slots.begin(), slots.end(), [](Pos a, Pos b) {
        return mix64(static_cast<uint64_t>(raw(a))) < mix64(static_cast<uint64_t>(raw(b)));
      });
      std::vector<int32_t> found(slots.size());
      alike.last_alike(h, slots, found);
      for (int i = 0; i < static_cast<int>(slots.size()); ++i) {
        int expected = -1;
        for (int j = 0; j < static_cast<int>(slots.size()); ++j)
          if (j != i && cosine(h, raw(slots[i]), raw(slots[j])) > kThreshold) expected = j;
        EXPECT_EQ(found[i], expected) << "head " << h << " slot " << i << " of " << slots.size();
        (expected < 0 ? none : some) += 1;
      }
    }
  }
  EXPECT_GT(none, 10);
  EXPECT_GT(some, 100);
}

}  // namespace
}  // namespace kvlapse
