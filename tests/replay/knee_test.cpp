#include "replay/knee.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace kvlapse {
namespace {

TEST(Knee, StandsWhereTheCurveBends) {
  const std::vector<double> xs = {1, 2, 3, 4, 5}, rising = {0.2, 0.8, 0.85, 0.9, 0.95},
                            falling = {0.8, 0.2, 0.15, 0.1, 0.05};
  EXPECT_EQ(find_knee(xs, rising, true), 1);
  EXPECT_EQ(find_knee(xs, falling, false), 1);
}

TEST(Knee, IsNotThereOnALineOrTheWrongWay) {
  const std::vector<double> xs = {1, 2, 3}, straight = {1, 2, 3}, falling = {3, 2.9, 1};
  EXPECT_EQ(find_knee(xs, straight, true), -1);
  EXPECT_EQ(find_knee(xs, falling, true), -1);
  EXPECT_EQ(find_knee(std::vector<double>{1, 2}, std::vector<double>{0, 1}, true), -1);
}

TEST(Front, HoldsWhatNothingBeats) {
  const std::vector<double> xs = {3, 1, 2, 2, 4}, ys = {0.9, 0.5, 0.7, 0.6, 0.8};
  EXPECT_EQ(find_front(xs, ys, true), (std::vector<int>{1, 2, 0}));
  EXPECT_EQ(find_front(xs, ys, false), (std::vector<int>{1}));
  EXPECT_EQ(find_front(std::vector<double>{1, 2}, std::vector<double>{NAN, 1}, true), (std::vector<int>{1}));
}

}  // namespace
}  // namespace kvlapse
