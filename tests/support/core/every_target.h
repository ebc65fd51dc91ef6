// Tests that run once with the code of each kind of SIMD that this CPU has, and once without any:
//   class RowMath : public EveryTarget {};
//   TEST_P(RowMath, ...)
//   INSTANTIATE_TEST_SUITE_P(Simd, RowMath, simd_targets(), simd_target_name);
#pragma once

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cstdint>
#include <string>
#include <vector>

namespace kvlapse {

class EveryTarget : public testing::TestWithParam<int64_t> {
 protected:
  // A file without code for the target takes its next best.
  void SetUp() override {
    hwy::GetChosenTarget().Update((hwy::SupportedTargets() & -GetParam()) | HWY_STATIC_TARGET);
  }
  void TearDown() override { hwy::GetChosenTarget().Update(hwy::SupportedTargets()); }
};

inline auto simd_targets() {
  std::vector<int64_t> targets = {HWY_STATIC_TARGET};
  for (int64_t target : {HWY_AVX2, HWY_AVX3, HWY_AVX3_DL})
    if (hwy::SupportedTargets() & target) targets.push_back(target);
  return testing::ValuesIn(targets);
}

inline std::string simd_target_name(const testing::TestParamInfo<int64_t>& info) {
  return hwy::TargetName(info.param);
}

}  // namespace kvlapse
