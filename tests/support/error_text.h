// The message of the Error that a call throws, for tests of what users read; fails the test when nothing is
// thrown.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "core/base/error.h"

namespace kvlapse::testing {

template <typename Call>
std::string error_text(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    std::string text = error.what();
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    return text;
  }
  ADD_FAILURE() << "expected an Error";
  return {};
}

}  // namespace kvlapse::testing
