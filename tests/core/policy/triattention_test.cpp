// TriAttention by hand, and what it refuses.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <filesystem>

#include "core/policy/query_centres.h"
#include "tests/support/core/centres_file.h"
#include "tests/support/core/policy_bench.h"

namespace kvlapse {
namespace {

using testing::ElementsAre;
using testing::FloatNear;
using testing::HasSubstr;
using testing::Pointwise;

QueryCentres one_pair(float real, float imaginary, float magnitude) {
  QueryCentres centres;
  centres.n_layers = centres.n_q_heads = 1;
  centres.head_dim = 2;
  centres.rope_theta = 10000;
  centres.n_queries = 7;
  centres.traces = {"trace"};
  centres.tokens = {"tokens"};
  centres.centre = {real, imaginary};
  centres.magnitude = {magnitude};
  return centres;
}

// One pair turns by one radian a position. Mean query (1, 0) of mean length 1, distances 1 and 2 alone: the
// plain score of a key (a, b) at p, as stored, is the mean of a cos(t + d) + b sin(t + d).
TEST(TriAttention, PlacesTheMeanQueryAtTheComingDistances) {
  test::CentresFile file(one_pair(1, 0, 1));
  PolicyBench b("triattention:farthest=2:noise=0:pin_prompt=0:cadence=1:calibration=" + file.path(), 1, 1, 2,
                2);
  b.append(3);  // t = 2
  // Keys without rotation (1, 0), (0, 1), (-1, 0), stored at 0, 1, 2.
  auto stored = [](double real, double imaginary, int pos) {
    return std::complex<double>(real, imaginary) * std::polar(1.0, static_cast<double>(pos));
  };
  const std::complex<double> keys[] = {stored(1, 0, 0), stored(0, 1, 1), stored(-1, 0, 2)};
  b.inputs.keys_of = {{}};
  for (const auto& k : keys) {
    b.inputs.keys_of[0].push_back(static_cast<float>(k.real()));
    b.inputs.keys_of[0].push_back(static_cast<float>(k.imag()));
  }
  // By the definition: amplitude 1, angle of E q conj(k), cosine over t - p + d.
  const double plain[] = {(std::cos(3) + std::cos(4)) / 2,
                          (std::cos(2 - M_PI / 2) + std::cos(3 - M_PI / 2)) / 2,
                          (std::cos(1 + M_PI) + std::cos(2 + M_PI)) / 2};
  const double mean = (plain[0] + plain[1] + plain[2]) / 3;
  double squares = 0;
  for (double x : plain) squares += (x - mean) * (x - mean);
  std::vector<float> expected;
  for (double x : plain) expected.push_back(static_cast<float>((x - mean) / std::sqrt(squares / 3)));
  EXPECT_THAT(b.score(), Pointwise(FloatNear(2e-6f), expected));
  EXPECT_THAT(b.dropped(), ElementsAre(0));
}

// A mean query of length 0 whose queries are 3 long: keys count by their length alone.
TEST(TriAttention, QueriesThatPointNowhereLeaveTheKeysLength) {
  test::CentresFile file(one_pair(0, 0, 3));
  PolicyBench b("triattention:noise=0:pin_prompt=0:cadence=1:calibration=" + file.path(), 1, 1, 2, 2);
  b.append(3);
  b.inputs.keys_of = {{3, 4, 0, 1, 6, 8}};  // lengths 5, 1, 10: plain scores 15, 3, 30
  const double deviation = std::sqrt((1.0 + 169.0 + 196.0) / 3);
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-5f),
                                   {static_cast<float>(-1 / deviation), static_cast<float>(-13 / deviation),
                                    static_cast<float>(14 / deviation)}));
  EXPECT_THAT(b.dropped(), ElementsAre(1));
}

TEST(TriAttention, PinsThePromptAndTakesTheMostOfTheGroup) {
  auto policy = make_policy("triattention");
  EXPECT_TRUE(policy->info().rule.pin_prompt);
  EXPECT_EQ(policy->info().rule.gqa, GqaRule::max);
  EXPECT_EQ(policy->info().rule.cadence, 128);
}

TEST(TriAttention, SaysWhichCalibrationItHasAndRefusesAnother) {
  test::CentresFile file(one_pair(1, 0, 1)), other(one_pair(0, 1, 1));
  const auto policy = make_policy("triattention:calibration=" + file.path());
  EXPECT_THAT(policy->info().fitted_on, ElementsAre("trace", "tokens"));
  const std::string spec = canonical_spec(*policy);
  const std::string id = query_centres_id(file.path());
  EXPECT_THAT(spec, HasSubstr(":fit=" + id));
  EXPECT_EQ(canonical_spec(*make_policy(spec)), spec);
  EXPECT_THROW(make_policy("triattention:calibration=" + other.path() + ":fit=" + id), Error);
  EXPECT_THROW(make_policy("triattention:calibration=/nowhere.safetensors"), Error);
  EXPECT_THROW(make_policy("triattention:calibratoin=x"), UsageError);
  const CacheGeometry fits{1, 1, 1, 2, 0, DType::f32}, wider{1, 2, 1, 2, 0, DType::f32};
  policy->check_model(fits, 10000);
  EXPECT_THROW(policy->check_model(wider, 10000), Error);
  EXPECT_THROW(policy->check_model(fits, 5000), Error);
  EXPECT_THROW(make_policy("triattention")->check_model(fits, 10000), Error);
}

TEST(QueryCentres, SurviveAFileAndADamagedOneIsNamed) {
  QueryCentres centres = one_pair(0.25f, -3, 3.5f);
  centres.traces = {"a", "b"};
  test::CentresFile file(centres);
  const QueryCentres read = QueryCentres::read(file.path());
  EXPECT_EQ(read.centre, centres.centre);
  EXPECT_EQ(read.magnitude, centres.magnitude);
  EXPECT_EQ(read.traces, centres.traces);
  EXPECT_EQ(read.tokens, centres.tokens);
  EXPECT_EQ(read.rope_theta, 10000);
  EXPECT_EQ(read.n_queries, 7);
  centres.magnitude[0] = NAN;
  const test::CentresFile not_finite(centres);
  EXPECT_THAT([&] { QueryCentres::read(not_finite.path()); },
              testing::ThrowsMessage<Error>(testing::HasSubstr("magnitude[0]: expected finite numbers")));
  centres.magnitude.clear();
  EXPECT_THROW(QueryCentres::read(test::CentresFile(centres).path()), Error);
}

}  // namespace
}  // namespace kvlapse
