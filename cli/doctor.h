// What works on this machine, what does not, and what to do: for `kvlapse doctor` and the dashboard. Any
// thread.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace kvlapse::cli {

struct Finding {
  std::string name;
  enum class State { works, missing, broken } state;
  std::string detail;
  std::string advice;
};
std::string_view state_name(Finding::State state);
// The first three decide whether recording works here: instructions, a model and a disk.
std::vector<Finding> examine_machine();

}  // namespace kvlapse::cli
