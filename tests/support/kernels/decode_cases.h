// The cases that every decode kernel must pass, emulated or on a GPU: geometries, scores, protections and the
// data that breaks kernels (huge logits, ties, zero values, one slot, empty, all protected, ragged, odd slot
// counts).
#pragma once

#include <string>
#include <vector>

#include "tests/support/kernels/decode_problem.h"

namespace kvlapse {

struct NamedDecodeCase {
  std::string name;
  DecodeCase decode;
  int splits = 0;  // 0: the plan's choice
};

// `small`: sizes that the emulator runs in a second.
std::vector<NamedDecodeCase> decode_cases(bool small);
// Those where the score makes a difference and a few of their own, with the error of leaving a slot out.
std::vector<NamedDecodeCase> leave_one_out_cases(bool small);
// The same with K and V in fp8; what was their type is that of q, new rows and output.
std::vector<NamedDecodeCase> fp8_decode_cases(bool small);
std::vector<NamedDecodeCase> fp8_cases(std::vector<NamedDecodeCase> cases);

}  // namespace kvlapse
