// Runs the program as a user does, and says what came out.
#pragma once

#include <string>
#include <vector>

namespace kvlapse::test {

struct Outcome {
  int exit_code = -1;
  std::string out, err;
};

// `arguments` as the shell would pass them; no shell is involved.
Outcome run_program(const std::vector<std::string>& arguments);

}  // namespace kvlapse::test
