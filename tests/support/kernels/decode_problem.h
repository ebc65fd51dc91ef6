// One fused decode step as plain host arrays, and its definition in fp64. The emulated and the GPU kernel run
// on the same problems and are judged by the same check.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/decode/decode_args.h"
#include "kernels/decode/decode_plan.h"

namespace kvlapse {

struct DecodeProblem {
  DecodeShape shape;
  FusedScore score = FusedScore::contribution;
  bool shared = false;
  bool appends = true;
  bool writes_importance = true;
  int budget = 0, recent = 0, pinned = 0;
  int n_splits = 1;  // that the victim keys are kept for

  std::vector<uint16_t> q, k_new, v_new, k, v, out;  // K and V of fp8: two values a word
  std::vector<float> k_scale, v_scale;               // of fp8
  std::vector<float> value_l1, accumulated, importance;
  std::vector<uint16_t> protect;
  std::vector<int32_t> recent_slots, positions, count, step_pos;  // count may be empty
  std::vector<uint64_t> victim_keys;
  std::vector<uint32_t> arrivals, flags;

  int held(int b, int h) const;               // before the step
  int slot_of_new_token(int b, int h) const;  // -1: none
  float score_scale() const;
  float to_float(uint16_t bits) const;  // of q, new rows and output
  uint16_t from_float(float value) const;
  // A row of a plane as numbers, and the row that a step makes of new values there.
  std::vector<float> row(const std::vector<uint16_t>& plane, const std::vector<float>& scale, size_t item,
                         int slot) const;
  void set_row(std::vector<uint16_t>& plane, std::vector<float>& scale, size_t item, int slot,
               const uint16_t* values) const;
  size_t row_words() const { return shape.row_bytes() / 2; }
};

struct DecodeCase {
  DecodeShape shape;
  FusedScore score = FusedScore::contribution;
  bool shared = false;
  bool appends = true;
  int budget = 0;  // 0: every slot
  int recent = 0, pinned = 0;
  std::vector<int>
      tokens;  // [B] seen so far, which is the position of the step's token; -1 skips the sequence
  double logit_range = 3;  // standard deviation of the logits
  // near_rows: values that differ by a thousandth.
  enum class Data : uint8_t { random, equal_rows, zero_values, one_hot, near_rows } data = Data::random;
  bool ragged = false;  // heads hold different counts
  uint64_t seed = 1;
};

// A consistent state after `tokens` tokens, with NaN in every slot that holds none and in the output.
DecodeProblem make_decode_problem(const DecodeCase& c, int n_splits);

// Draws the next token's q, k, v.
void draw_decode_token(DecodeProblem& p, const DecodeCase& c, uint64_t step);

struct DecodeCheck {
  std::string failure;                       // empty: as defined
  double output_error = 0, score_error = 0;  // largest relative ones
  int near_ties = 0;                         // victims that differ from fp64's within rounding
};

// Whether `after` is what the step makes of `before`.
DecodeCheck check_decode_step(const DecodeProblem& before, const DecodeProblem& after);

}  // namespace kvlapse
