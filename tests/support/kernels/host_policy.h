// The victims that the host's policy and evictor choose from what a decode step attended: the definition of
// the fused kernel's choice.
#pragma once

#include <string_view>
#include <vector>

#include "tests/support/kernels/decode_problem.h"

namespace kvlapse {

struct HostVictims {
  std::vector<int> slots;                  // by score row: one, or one a kv head
  std::vector<std::vector<float>> scores;  // [row][slot]
};

// Two full sequences whose victims such a policy chooses, with its score, granularity and recent tokens.
DecodeCase case_of_policy(std::string_view policy_spec);

// Of sequence b after a step, all of whose heads hold `budget` tokens.
HostVictims host_policy_victims(const DecodeProblem& after, int b, std::string_view policy_spec);

// What the device chose; -1: nothing.
int device_victim(const DecodeProblem& after, int b, int row);

}  // namespace kvlapse
