#include "core/task/task.h"

#include <array>
#include <stdexcept>
#include <utility>

#include "core/task/task_generators.h"

namespace kvlapse {
namespace {

using Generator = TaskText (*)(TaskRng&, int size);

struct FamilyEntry {
  TaskFamily family;
  Generator generate;
};

// The size ranges keep prompt and completion together within 5120 tokens, the longest text of the training.
constexpr std::array kEntries = {
    FamilyEntry{
        {"sum", "running sum of a list: every number of the prompt is read once, in order", 3, 300, 100},
        generate_sum},
    FamilyEntry{{"chain", "shuffled assignments solved depth first, then a verification pass", 4, 52, 40},
                generate_chain},
    FamilyEntry{{"prog", "a short program over a few registers, run pass after pass", 2, 80, 34},
                generate_prog},
    FamilyEntry{{"sort", "selection sort with the remaining list written out in every pass", 3, 46, 26},
                generate_sort},
    FamilyEntry{{"walk", "a walk over a shuffled edge list: random reads of the prompt", 3, 400, 120},
                generate_walk},
    FamilyEntry{
        {"rotor", "a walk whose next edge depends on the latest visit to the node, far back", 3, 400, 120},
        generate_rotor},
    FamilyEntry{{"marathon", "the rotor walk for more than 4096 tokens", 384, 400, 390}, generate_rotor},
};

constexpr auto kFamilies = [] {
  std::array<TaskFamily, kEntries.size()> families{};
  for (size_t i = 0; i < kEntries.size(); ++i) families[i] = kEntries[i].family;
  return families;
}();

bool ends_with_answer(std::string_view generated, std::string_view answer) {
  const size_t tag = generated.rfind(kEndThinkTag);
  if (tag == std::string_view::npos) return false;
  std::string_view rest = generated.substr(tag + kEndThinkTag.size());
  return rest.substr(0, rest.find(kEndToken)) == answer;
}

}  // namespace

std::span<const TaskFamily> task_families() {
  return kFamilies;
}

const TaskFamily* find_task_family(std::string_view name) {
  for (const TaskFamily& family : kFamilies)
    if (family.name == name) return &family;
  return nullptr;
}

std::string_view longest_task_family() {
  return "marathon";
}

TaskProblem make_task_problem(std::string_view family, uint64_t seed, int size) {
  for (const FamilyEntry& entry : kEntries) {
    const TaskFamily& f = entry.family;
    if (f.name != family) continue;
    if (size == 0) size = f.default_size;
    if (size < f.min_size || size > f.max_size) {
      throw std::invalid_argument("task " + std::string(family) + ": size " + std::to_string(size) +
                                  " is outside " + std::to_string(f.min_size) + " to " +
                                  std::to_string(f.max_size));
    }
    TaskRng rng = TaskRng::for_problem(family, seed, size);
    TaskText text = entry.generate(rng, size);
    TaskProblem problem{std::string(family), seed, size, std::move(text.prompt), {}, std::move(text.answer)};
    problem.completion.append(kThinkTag).append(text.thought).append(kEndThinkTag).append(problem.answer);
    return problem;
  }
  std::string known;
  for (const TaskFamily& f : kFamilies) known.append(known.empty() ? "" : ", ").append(f.name);
  throw std::invalid_argument("unknown task '" + std::string(family) + "', expected one of " + known);
}

size_t task_token_count(std::string_view text) {
  size_t count = 0;
  while (!text.empty()) {
    size_t step = 1;
    for (std::string_view special : {kThinkTag, kEndThinkTag, kEndToken})
      if (text.starts_with(special)) step = special.size();
    text.remove_prefix(step);
    ++count;
  }
  return count;
}

std::string extract_answer(std::string_view generated) {
  const size_t tag = generated.rfind(kEndThinkTag);
  if (tag == std::string_view::npos) return "";
  std::string_view rest = generated.substr(tag + kEndThinkTag.size());
  rest = rest.substr(0, rest.find(kEndToken));
  while (!rest.empty() && (rest.back() == '\n' || rest.back() == ' ')) rest.remove_suffix(1);
  return std::string(rest);
}

bool answer_is_right(const TaskProblem& problem, std::string_view generated) {
  return ends_with_answer(generated, problem.answer);
}

}  // namespace kvlapse
