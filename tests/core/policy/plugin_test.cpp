#include "core/policy/plugin.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/core/policy_bench.h"
#include "tests/support/error_text.h"

namespace kvlapse {
namespace {

using ::testing::ElementsAre;
using testing::error_text;
using ::testing::HasSubstr;

std::string library(const std::string& name) {
  return std::string(KVLAPSE_TEST_PLUGINS) + "/lib" + name + ".so";
}

TEST(Plugin, TheExampleRanksByFadingAttention) {
  PolicyBench b(library("decayed_attention") + ":alpha=0.5", 2, 1, 1, 3);
  b.append(2);
  b.inputs.attention_of = {{0.8f, 0.2f}, {0.4f, 0.6f}};
  b.observe();
  b.append();
  b.inputs.attention_of = {{0.2f, 0.1f, 0.7f}, {0.2f, 0.3f, 0.5f}};
  b.observe();
  EXPECT_THAT(b.score(), ::testing::Pointwise(::testing::FloatNear(1e-6f), {0.5f, 0.4f, 0.6f}));
  EXPECT_THAT(b.dropped(), ElementsAre(1));
}

TEST(Plugin, ParametersAndCommonKeysAreCheckedAsForAnyPolicy) {
  const std::string path = library("decayed_attention");
  EXPECT_EQ(canonical_spec(*make_policy(path + ":alpha=0.3:pin_prompt=1")), path + ":alpha=0.3:pin_prompt=1");
  EXPECT_EQ(canonical_spec(*make_policy(path)), path);
  EXPECT_THROW(make_policy(path + ":alpha=2"), UsageError);
  EXPECT_THROW(make_policy(path + ":beta=1"), UsageError);
  EXPECT_THROW(make_policy("." + path.substr(path.rfind('/')) + "@x"), Error);
}

TEST(Plugin, LibrariesThatAreNoneAreRefusedByName) {
  EXPECT_THAT(error_text([] { make_policy("./missing.so"); }),
              HasSubstr("plug-in ./missing.so: expected a shared library"));
  EXPECT_THAT(error_text([] { make_policy(library("broken_abi")); }),
              HasSubstr("libbroken_abi.so: interface version: expected 1, found 2"));
}

TEST(Plugin, AFailingCallNamesThePlugin) {
  PolicyBench works(library("broken"), 1, 1, 1, 2), error(library("broken") + ":how=1", 1, 1, 1, 2),
      nan(library("broken") + ":how=3", 1, 1, 1, 2);
  for (PolicyBench* b : {&works, &error, &nan}) b->append(2);
  EXPECT_THAT(works.dropped(), ElementsAre(0));
  EXPECT_THAT(error_text([&] { error.dropped(); }),
              HasSubstr("(broken): score at step 1, layer 0: expected 0, found 7"));
  EXPECT_THAT(error_text([&] { nan.dropped(); }), HasSubstr("libbroken.so: score is NaN"));
}

TEST(PluginDeathTest, ACrashNamesThePlugin) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        PolicyBench b(library("broken") + ":how=2", 1, 1, 1, 2);
        b.append(2);
        b.dropped();
      },
      ::testing::ExitedWithCode(2),
      "kvlapse: plug-in broken: crashed inside its own code \\(Segmentation fault\\)");
}

}  // namespace
}  // namespace kvlapse
