// The real model that `make models` fetches. Tests that need it skip where it is absent, except where
// KVLAPSE_REQUIRE_MODELS is set (continuous integration): there they fail.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

namespace kvlapse {

inline const std::filesystem::path kSmolLm2 = KVLAPSE_MODELS "/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

}  // namespace kvlapse

#define KVLAPSE_NEEDS_SMOLLM2()                                                                        \
  if (!std::filesystem::exists(::kvlapse::kSmolLm2)) {                                                 \
    if (std::getenv("KVLAPSE_REQUIRE_MODELS")) FAIL() << ::kvlapse::kSmolLm2 << ": run `make models`"; \
    GTEST_SKIP() << "needs the model that `make models` fetches";                                      \
  }
