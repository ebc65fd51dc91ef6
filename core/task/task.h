// Reasoning problems of any length with one right continuation: a prompt line, then a chain of thought
// between think tags, then the answer. Used to train the built-in model, to record it and to measure its
// accuracy. Needs nothing but the standard library, so that the training script can load it as a shared
// library (task_capi.h).
//
// Sizes count what the family repeats (numbers, assignments, passes, steps). One character is one token; a
// think tag is one token as well. Prompts and answers use neither '<' nor '>'.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace kvlapse {

inline constexpr std::string_view kThinkTag = "<think>";
inline constexpr std::string_view kEndThinkTag = "</think>";
inline constexpr std::string_view kEndToken = "<|end|>";

struct TaskProblem {
  std::string family;
  uint64_t seed = 0;
  int size = 0;
  std::string prompt;      // given to the model; ends with a newline
  std::string completion;  // what a perfect greedy run generates, without the end token
  std::string answer;      // the part of `completion` after the end-of-think tag
};

struct TaskFamily {
  std::string_view name;
  std::string_view summary;
  int min_size;
  int max_size;
  int default_size;
};

// All families, in a fixed order.
std::span<const TaskFamily> task_families();
// nullptr when there is no such family.
const TaskFamily* find_task_family(std::string_view name);
// The family whose default problems are the longest: always more than 4096 generated tokens.
std::string_view longest_task_family();

// size 0: the family's default. Throws std::invalid_argument for an unknown family or a size out of its
// range.
TaskProblem make_task_problem(std::string_view family, uint64_t seed, int size = 0);

// Tokens of a text of this module: characters, with each special token counted once.
size_t task_token_count(std::string_view text);

// Text after the last end-of-think tag, up to the end token; "" when the tag is missing.
std::string extract_answer(std::string_view generated);
// Right: the end token or the end of the text follows the answer, and the answer is equal to the last
// character.
bool answer_is_right(const TaskProblem& problem, std::string_view generated);

}  // namespace kvlapse
