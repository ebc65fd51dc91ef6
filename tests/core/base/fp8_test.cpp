#include "core/base/fp8.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace kvlapse {
namespace {

// By search over all values: the nearest, the even byte among two at the same distance.
uint8_t nearest(float value) {
  int best = 0;
  double least = 1e30;
  for (int byte = 0; byte < 0x7f; ++byte) {
    const double distance =
        std::fabs(std::fabs(static_cast<double>(value)) - e4m3_to_f32(static_cast<uint8_t>(byte)));
    if (distance < least || (distance == least && byte % 2 == 0)) best = byte, least = distance;
  }
  return static_cast<uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

TEST(Fp8, ValuesOfBytes) {
  EXPECT_EQ(e4m3_to_f32(0x7e), 448.0f);
  EXPECT_EQ(e4m3_to_f32(0x08), 0x1p-6f);
  EXPECT_EQ(e4m3_to_f32(0x01), 0x1p-9f);
  EXPECT_EQ(e4m3_to_f32(0xb8), -1.0f);
  EXPECT_TRUE(std::isnan(e4m3_to_f32(0x7f)));
  EXPECT_TRUE(std::isnan(e4m3_to_f32(0xff)));
  for (int byte = 0; byte < 256; ++byte)
    if ((byte & 0x7f) != 0x7f) {
      EXPECT_EQ(f32_to_e4m3(e4m3_to_f32(static_cast<uint8_t>(byte))), byte);
    }
}

TEST(Fp8, RoundsToNearestEvenAndSaturates) {
  for (int byte = 0; byte < 0x7e; ++byte) {
    const float low = e4m3_to_f32(static_cast<uint8_t>(byte)),
                high = e4m3_to_f32(static_cast<uint8_t>(byte + 1));
    const float middle = 0.5f * (low + high);
    for (float v : {low, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e9f),
                    0.75f * low + 0.25f * high})
      for (float sign : {1.0f, -1.0f}) EXPECT_EQ(f32_to_e4m3(sign * v), nearest(sign * v)) << v;
  }
  EXPECT_EQ(f32_to_e4m3(449.0f), 0x7e);
  EXPECT_EQ(f32_to_e4m3(-1e30f), 0xfe);
  EXPECT_EQ(f32_to_e4m3(INFINITY), 0x7e);
  EXPECT_EQ(f32_to_e4m3(NAN) & 0x7f, 0x7f);
  EXPECT_EQ(f32_to_e4m3(0x1p-11f), 0);
}

TEST(Fp8, ARowUsesTheWholeRange) {
  std::vector<float> row{0.25f, -3.5f, 1.0f, 0.0f};
  uint8_t bytes[4];
  const float scale = quantise_fp8_row(row, bytes);
  EXPECT_EQ(bytes[1], 0xfe);
  EXPECT_EQ(e4m3_to_f32(bytes[1]) * scale, -3.5f);
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(e4m3_to_f32(bytes[i]) * scale, row[i], 0.0625f * std::fabs(row[i]));
  row.assign(4, 0.0f);
  EXPECT_EQ(quantise_fp8_row(row, bytes), 0.0f);
  EXPECT_EQ(bytes[2], 0);
}

}  // namespace
}  // namespace kvlapse
