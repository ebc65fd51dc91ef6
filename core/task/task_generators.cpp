#include "core/task/task_generators.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <string_view>
#include <vector>

namespace kvlapse {
namespace {

constexpr std::string_view kLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

std::string num(int x) {
  return std::to_string(x);
}

int modulo(int x, int m) {
  return ((x % m) + m) % m;
}

std::vector<char> distinct_letters(TaskRng& rng, int alphabet, int count) {
  std::vector<char> letters;
  for (int i : rng.distinct(0, alphabet - 1, count)) letters.push_back(kLetters[static_cast<size_t>(i)]);
  return letters;
}

// ------------------------------------------------------------------------------------------------------------
// chain

// "name = left op right"; left < 0: a constant. right < 0: the right operand is the literal `constant`.
struct Assignment {
  char name = 0;
  int left = -1, right = -1;  // indices of earlier assignments
  char op = 0;
  int constant = 0;
  int value = 0;
};

using Assignments = std::vector<Assignment>;

std::string definition(const Assignments& all, const Assignment& a) {
  if (a.left < 0) return num(a.value);
  std::string right = a.right < 0 ? num(a.constant) : std::string(1, all[static_cast<size_t>(a.right)].name);
  return std::string(1, all[static_cast<size_t>(a.left)].name) + a.op + right;
}

void solve(const Assignments& all, int index, std::vector<bool>& solved, std::string& out) {
  const Assignment& a = all[static_cast<size_t>(index)];
  if (solved[static_cast<size_t>(index)]) {
    out += a.name + ("=" + num(a.value)) + ";";
    return;
  }
  out += a.name + ("=" + definition(all, a)) + ";";
  if (a.left >= 0) {
    solve(all, a.left, solved, out);
    if (a.right >= 0) solve(all, a.right, solved, out);
    const int left = all[static_cast<size_t>(a.left)].value;
    const int right = a.right < 0 ? a.constant : all[static_cast<size_t>(a.right)].value;
    out += a.name + ("=" + num(left)) + a.op + num(right) + "=" + num(a.value) + ";";
  }
  solved[static_cast<size_t>(index)] = true;
}

Assignments draw_assignments(TaskRng& rng, int count) {
  const std::vector<char> names = distinct_letters(rng, 52, count);
  Assignments all;
  for (int i = 0; i < count; ++i) {
    Assignment a;
    a.name = names[static_cast<size_t>(i)];
    if (i < 2 || (i + 1 < count && rng.chance(8))) {
      a.value = rng.between(0, 99);
      all.push_back(a);
      continue;
    }
    a.left = rng.chance(50) ? i - 1 : rng.between(std::max(0, i - 6), i - 1);
    a.op = "+-*"[rng.below(3)];
    if (rng.chance(75)) {
      a.right = rng.between(0, i - 2);  // any earlier one but `left`
      if (a.right >= a.left) ++a.right;
    } else {
      a.constant = rng.between(1, 9);
    }
    const int x = all[static_cast<size_t>(a.left)].value;
    const int y = a.right < 0 ? a.constant : all[static_cast<size_t>(a.right)].value;
    a.value = modulo(a.op == '+' ? x + y : a.op == '-' ? x - y : x * y, 100);
    all.push_back(a);
  }
  return all;
}

// -------------------------------------------------------------------------------------------------------------
// prog

struct Instruction {
  int target = 0;
  char op = 0;
  int source = -1;  // a register, or -1: the literal `constant`
  int constant = 0;
};

std::vector<Instruction> draw_program(TaskRng& rng, int registers) {
  std::vector<int> targets;
  for (int r = 0; r < registers; ++r) targets.push_back(r);
  for (int extra = rng.between(0, 2); extra > 0; --extra) targets.push_back(rng.between(0, registers - 1));
  rng.shuffle(targets);
  std::vector<Instruction> program;
  for (int target : targets) {
    Instruction ins{target, rng.chance(50) ? '+' : '-', -1, 0};
    if (rng.chance(50)) {
      ins.source = rng.between(0, registers - 2);  // another register
      if (ins.source >= target) ++ins.source;
    } else {
      ins.constant = rng.between(1, 9);
    }
    program.push_back(ins);
  }
  return program;
}

// -------------------------------------------------------------------------------------------------------------
// walk

struct Edge {
  int to = 0;
  int weight = 0;
};

TaskText generate_graph_walk(TaskRng& rng, int steps, bool rotor) {
  const int nodes = rng.between(10, 26);
  const std::vector<char> names = distinct_letters(rng, 26, nodes);
  std::vector<std::array<Edge, 2>> edges(static_cast<size_t>(nodes));
  std::vector<std::pair<int, int>> order;
  for (int node = 0; node < nodes; ++node) {
    for (int label = 0; label < 2; ++label) {
      edges[static_cast<size_t>(node)][static_cast<size_t>(label)] = {rng.between(0, nodes - 1),
                                                                      rng.between(1, 9)};
      order.emplace_back(node, label);
    }
  }
  rng.shuffle(order);

  auto name = [&](int node) { return names[static_cast<size_t>(node)]; };
  auto edge_text = [&](int node, int label) {
    const Edge& e = edges[static_cast<size_t>(node)][static_cast<size_t>(label)];
    return name(node) + num(label) + name(e.to) + num(e.weight);
  };
  int at = rng.between(0, nodes - 1), sum = rng.between(0, 99);
  TaskText text;
  text.prompt = (rotor ? "rotor " : "walk ") + num(steps) + " from " + name(at) + num(sum) + ":";
  for (size_t i = 0; i < order.size(); ++i) {
    if (i > 0) text.prompt += ",";
    text.prompt += edge_text(order[i].first, order[i].second);
  }
  text.prompt += "?\n";

  std::vector<int> next_label(static_cast<size_t>(nodes), 0);
  for (int left = steps; left > 0; --left) {
    int& turn = next_label[static_cast<size_t>(at)];
    const int label = rotor ? turn : sum % 2;
    turn = 1 - turn;
    const Edge& e = edges[static_cast<size_t>(at)][static_cast<size_t>(label)];
    sum = (sum + e.weight) % 100;
    text.thought += num(left) + ":" + edge_text(at, label) + "=" + num(sum) + ";";
    at = e.to;
  }
  text.answer = name(at) + num(sum);
  return text;
}

}  // namespace

TaskText generate_sum(TaskRng& rng, int size) {
  TaskText text;
  text.prompt = "sum:";
  int total = 0;
  for (int x : rng.distinct(100, 999, size)) {
    text.prompt += (text.thought.empty() ? "" : ",") + num(x);
    const int next = (total + x) % 1000;
    text.thought += num(total) + "+" + num(x) + "=" + num(next) + ";";
    total = next;
  }
  text.prompt += "?\n";
  text.answer = num(total);
  return text;
}

TaskText generate_chain(TaskRng& rng, int size) {
  // Drawn again until the two names asked for need at least half of the assignments.
  Assignments all;
  int first = size - 1, second = 0;
  std::string thought;
  for (std::ptrdiff_t needed = 0; 2 * needed < size;) {
    all = draw_assignments(rng, size);
    second = rng.between(1, size - 2);
    thought.clear();
    std::vector<bool> solved(all.size(), false);
    solve(all, first, solved, thought);
    solve(all, second, solved, thought);
    needed = std::count(solved.begin(), solved.end(), true);
  }
  std::vector<int> order;
  for (int i = 0; i < size; ++i) order.push_back(i);
  rng.shuffle(order);

  TaskText text;
  text.prompt = "chain:";
  for (size_t i = 0; i < order.size(); ++i) {
    const Assignment& a = all[static_cast<size_t>(order[i])];
    text.prompt += (i > 0 ? ";" : "") + std::string(1, a.name) + "=" + definition(all, a);
  }
  const Assignment& x = all[static_cast<size_t>(first)];
  const Assignment& y = all[static_cast<size_t>(second)];
  text.prompt += std::string("?") + x.name + "," + y.name + "\n";
  text.thought = thought + "#" + thought;
  text.answer = num(x.value) + "," + num(y.value);
  return text;
}

TaskText generate_prog(TaskRng& rng, int size) {
  constexpr std::string_view kNames = "abcd";
  const int count = rng.between(2, 4);
  std::vector<int> registers;
  for (int i = 0; i < count; ++i) registers.push_back(rng.between(0, 99));
  const std::vector<Instruction> program = draw_program(rng, count);

  auto name = [&](int r) { return kNames[static_cast<size_t>(r)]; };
  auto value = [&](int r) -> int& { return registers[static_cast<size_t>(r)]; };
  TaskText text;
  text.prompt = "prog " + num(size) + ":";
  for (int r = 0; r < count; ++r)
    text.prompt += (r > 0 ? "," : "") + std::string(1, name(r)) + "=" + num(value(r));
  for (size_t i = 0; i < program.size(); ++i) {
    const Instruction& ins = program[i];
    text.prompt += (i > 0 ? "," : ";") + std::string(1, name(ins.target)) + ins.op;
    text.prompt += ins.source < 0 ? num(ins.constant) : std::string(1, name(ins.source));
  }
  text.prompt += "?\n";
  for (int left = size; left > 0; --left) {
    text.thought += num(left) + ":";
    for (size_t i = 0; i < program.size(); ++i) {
      const Instruction& ins = program[i];
      const int x = value(ins.target), y = ins.source < 0 ? ins.constant : value(ins.source);
      value(ins.target) = modulo(ins.op == '+' ? x + y : x - y, 100);
      text.thought += (i > 0 ? "," : "") + std::string(1, name(ins.target)) + num(x) + ins.op + num(y) + "=" +
                      num(value(ins.target));
    }
    text.thought += ";";
  }
  for (int r = 0; r < count; ++r) text.answer += (r > 0 ? "," : "") + num(value(r));
  return text;
}

TaskText generate_sort(TaskRng& rng, int size) {
  struct Item {
    int key;
    char label;
  };
  std::vector<Item> items;
  for (int key : rng.distinct(10, 99, size)) items.push_back({key, kLetters[rng.below(kLetters.size())]});
  // Never the largest two of a long list: who has lost most of it often still knows those.
  const int least = (3 * size + 3) / 4, most = std::max(least, size - 2);
  int passes = 0;
  do passes = rng.between(least, size);
  while (passes > most);

  auto item_text = [](const Item& item) { return num(item.key) + item.label; };
  auto list_text = [&](char separator) {
    std::string list;
    for (const Item& item : items) {
      if (!list.empty()) list += separator;
      list += item_text(item);
    }
    return list;
  };
  TaskText text;
  text.prompt = "sort " + num(passes) + ":" + list_text(',') + "?\n";
  for (int left = passes; left > 0; --left) {
    const auto smallest = std::min_element(items.begin(), items.end(),
                                           [](const Item& a, const Item& b) { return a.key < b.key; });
    text.answer = item_text(*smallest);
    text.thought += num(left) + ":" + list_text(' ') + "|" + text.answer + ";";
    items.erase(smallest);
  }
  return text;
}

TaskText generate_walk(TaskRng& rng, int size) {
  return generate_graph_walk(rng, size, false);
}

TaskText generate_rotor(TaskRng& rng, int size) {
  return generate_graph_walk(rng, size, true);
}

}  // namespace kvlapse
