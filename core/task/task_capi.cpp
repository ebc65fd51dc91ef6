#include "core/task/task_capi.h"

#include <exception>
#include <string>

#include "core/task/task.h"

int kvlapse_task_family_count(void) {
  return static_cast<int>(kvlapse::task_families().size());
}

const char* kvlapse_task_family(int index, int sizes[3]) {
  const auto families = kvlapse::task_families();
  if (index < 0 || static_cast<size_t>(index) >= families.size()) return nullptr;
  const kvlapse::TaskFamily& family = families[static_cast<size_t>(index)];
  if (sizes != nullptr) {
    sizes[0] = family.min_size;
    sizes[1] = family.max_size;
    sizes[2] = family.default_size;
  }
  return family.name.data();  // a string literal: ends with a zero byte
}

int64_t kvlapse_task_make(const char* family, uint64_t seed, int size, char* text, int64_t capacity,
                          int64_t lengths[3]) {
  try {
    const kvlapse::TaskProblem problem = kvlapse::make_task_problem(family, seed, size);
    int64_t total = 0;
    const std::string* parts[3] = {&problem.prompt, &problem.completion, &problem.answer};
    for (int i = 0; i < 3; ++i) {
      lengths[i] = static_cast<int64_t>(parts[i]->size());
      total += lengths[i];
    }
    if (total > capacity) return total;
    for (const std::string* part : parts) text += part->copy(text, part->size());
    return total;
  } catch (const std::exception&) {
    return -1;
  }
}
