// The task generators: worked examples, stability of the random stream, lengths, and answers derived a second
// time from nothing but the prompt.
#include "core/task/task.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/task/task_capi.h"
#include "core/task/task_rng.h"

namespace kvlapse {
namespace {

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  std::stringstream stream{std::string(text)};
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

// Text between `from` and `to`.
std::string between(const std::string& text, const std::string& from, const std::string& to) {
  const size_t a = text.find(from) + from.size();
  return text.substr(a, text.find(to, a) - a);
}

int modulo(int x, int m) {
  return ((x % m) + m) % m;
}

std::string solve_sum(const std::string& prompt) {
  int total = 0;
  for (const std::string& x : split(between(prompt, ":", "?"), ',')) total += std::stoi(x);
  return std::to_string(total % 1000);
}

std::string solve_chain(const std::string& prompt) {
  std::map<char, std::string> pending;
  std::map<char, int> value;
  for (const std::string& a : split(between(prompt, ":", "?"), ';')) pending[a[0]] = a.substr(2);
  while (!pending.empty()) {
    const size_t before = pending.size();
    for (auto it = pending.begin(); it != pending.end();) {
      const std::string& d = it->second;
      const bool constant = std::isdigit(static_cast<unsigned char>(d[0])) != 0;
      const bool literal = !constant && std::isdigit(static_cast<unsigned char>(d[2])) != 0;
      if (constant) {
        value[it->first] = std::stoi(d);
      } else if (value.contains(d[0]) && (literal || value.contains(d[2]))) {
        const int x = value[d[0]], y = literal ? std::stoi(d.substr(2)) : value[d[2]];
        value[it->first] = modulo(d[1] == '+' ? x + y : d[1] == '-' ? x - y : x * y, 100);
      } else {
        ++it;
        continue;
      }
      it = pending.erase(it);
    }
    if (pending.size() == before) return "unsolvable";
  }
  const std::string asked = between(prompt, "?", "\n");
  return std::to_string(value[asked[0]]) + "," + std::to_string(value[asked[2]]);
}

std::string solve_prog(const std::string& prompt) {
  std::map<char, int> value;
  const int passes = std::stoi(between(prompt, "prog ", ":"));
  for (const std::string& r : split(between(prompt, ":", ";"), ',')) value[r[0]] = std::stoi(r.substr(2));
  for (int i = 0; i < passes; ++i) {
    for (const std::string& ins : split(between(prompt, ";", "?"), ',')) {
      const int y =
          std::isdigit(static_cast<unsigned char>(ins[2])) ? std::stoi(ins.substr(2)) : value[ins[2]];
      value[ins[0]] = modulo(value[ins[0]] + (ins[1] == '+' ? y : -y), 100);
    }
  }
  std::string answer;
  for (auto [name, x] : value) answer += (answer.empty() ? "" : ",") + std::to_string(x);
  return answer;
}

std::string solve_sort(const std::string& prompt) {
  std::vector<std::string> items = split(between(prompt, ":", "?"), ',');
  std::sort(items.begin(), items.end());  // keys have two digits and are distinct
  return items[static_cast<size_t>(std::stoi(between(prompt, "sort ", ":")) - 1)];
}

std::string solve_walk(const std::string& prompt) {
  const bool rotor = prompt.starts_with("rotor");
  int steps = std::stoi(between(prompt, " ", " from"));
  const std::string start = between(prompt, "from ", ":");
  std::map<std::string, std::pair<char, int>> edges;
  for (const std::string& e : split(between(prompt, ":", "?"), ','))
    edges[e.substr(0, 2)] = {e[2], e[3] - '0'};
  char at = start[0];
  int sum = std::stoi(start.substr(1));
  std::map<char, int> visits;
  for (; steps > 0; --steps) {
    const int label = (rotor ? visits[at]++ : sum) % 2;
    const auto [to, weight] = edges.at(std::string(1, at) + std::to_string(label));
    at = to;
    sum = (sum + weight) % 100;
  }
  return at + std::to_string(sum);
}

std::string solve(const std::string& family, const std::string& prompt) {
  if (family == "sum") return solve_sum(prompt);
  if (family == "chain") return solve_chain(prompt);
  if (family == "prog") return solve_prog(prompt);
  if (family == "sort") return solve_sort(prompt);
  return solve_walk(prompt);
}

uint64_t fnv1a(std::string_view text) {
  uint64_t h = 0xcbf29ce484222325ull;
  for (char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  return h;
}

TEST(Task, WorkedExamples) {
  struct Case {
    const char *family, *prompt, *completion;
    int size;
  };
  const std::array cases = {
      Case{"sum", "sum:396,471,620?\n", "<think>0+396=396;396+471=867;867+620=487;</think>487", 3},
      Case{"chain", "chain:p=Y*U;U=44;a=86;Y=j-a;O=U*2;j=a-O?p,U\n",
           "<think>p=Y*U;Y=j-a;j=a-O;a=86;O=U*2;U=44;O=44*2=88;j=86-88=98;a=86;Y=98-86=12;U="
           "44;p=12*44=28;U=44;#p=Y*U;Y=j-a;j=a-O;a=86;O=U*2;U=44;O=44*2=88;j=86-88=98;a=86;"
           "Y=98-86=12;U=44;p=12*44=28;U=44;</think>28,44",
           6},
      Case{"prog", "prog 2:a=52,b=30,c=16;b-7,a-6,c+b?\n",
           "<think>2:b30-7=23,a52-6=46,c16+23=39;1:b23-7=16,a46-6=40,c39+16=55;</think>40,16"
           ",55",
           2},
      Case{"sort", "sort 3:51W,19R,64M,85W?\n",
           "<think>3:51W 19R 64M 85W|19R;2:51W 64M 85W|51W;1:64M 85W|64M;</think>64M", 4},
      Case{"walk",
           "walk 3 from g17:b1b2,r0g1,f0o1,g0g8,a1f5,f1l3,d1d5,o1b9,b0d2,v0v8,l1d8,n0n9,d0a7"
           ",v1d5,g1l9,l0f1,r1o2,a0a4,o0l7,n1g3?\n",
           "<think>3:g1l9=26;2:l0f1=27;1:f1l3=30;</think>l30", 3},
      Case{"rotor",
           "rotor 12 from v43:w1m9,q0g7,y0p7,l0v5,n0g2,q1p2,y1l9,p1m4,t1q1,t0p4,m1q5,v1o7,c0"
           "q2,v0g9,p0i4,o0j6,i1i1,w0i3,f0c1,m0n6,g1n8,j1q8,j0t8,f1l2,i0w1,o1n5,n1o7,l1g6,c1"
           "q9,g0c9?\n",
           "<think>12:v0g9=52;11:g0c9=61;10:c0q2=63;9:q0g7=70;8:g1n8=78;7:n0g2=80;6:g0c9=89;"
           "5:c1q9=98;4:q1p2=0;3:p0i4=4;2:i0w1=5;1:w0i3=8;</think>i8",
           12},
  };
  for (const Case& c : cases) {
    const TaskProblem p = make_task_problem(c.family, 1, c.size);
    EXPECT_EQ(p.prompt, c.prompt);
    EXPECT_EQ(p.completion, c.completion);
  }
}

// A changed hash means that trained weights, recordings and published accuracies refer to other problems.
TEST(Task, ProblemsNeverChange) {
  const std::map<std::string, uint64_t> expected = {
      {"sum", 0xea115d9565b7552bull},      {"chain", 0x00e98009903b9a7full}, {"prog", 0x2800887565de7701ull},
      {"sort", 0x8e9b8a1f78919f70ull},     {"walk", 0xc32afdc59c892a16ull},  {"rotor", 0x58522393708b9023ull},
      {"marathon", 0x539dc80dd21f9179ull},
  };
  for (const TaskFamily& family : task_families()) {
    std::string all;
    for (uint64_t seed = 0; seed < 20; ++seed) {
      const TaskProblem p = make_task_problem(family.name, seed);
      all += p.prompt + p.completion + p.answer;
    }
    EXPECT_EQ(fnv1a(all), expected.at(std::string(family.name))) << family.name;
  }
}

TEST(Task, AnswersFollowFromThePromptAlone) {
  for (const TaskFamily& family : task_families()) {
    for (int size : {family.min_size, family.default_size, family.max_size}) {
      for (uint64_t seed = 1000; seed < 1040; ++seed) {
        const TaskProblem p = make_task_problem(family.name, seed, size);
        EXPECT_EQ(p.answer, solve(p.family, p.prompt)) << p.prompt;
        EXPECT_TRUE(p.completion.starts_with(kThinkTag));
        EXPECT_TRUE(p.completion.ends_with(std::string(kEndThinkTag) + p.answer));
        EXPECT_EQ(p.prompt.find('\n'), p.prompt.size() - 1);
        EXPECT_EQ(p.prompt.find_first_of("<>"), std::string::npos);
        EXPECT_LE(p.prompt.size() + task_token_count(p.completion) + 1, 5120u) << p.family << " " << size;
      }
    }
  }
}

TEST(Task, ChainVerifiesWhatItDerived) {
  const TaskProblem p = make_task_problem("chain", 3);
  const std::string first = between(p.completion, std::string(kThinkTag), "#");
  EXPECT_EQ(first, between(p.completion, "#", std::string(kEndThinkTag)));
}

TEST(Task, DefaultLengths) {
  for (const TaskFamily& family : task_families()) {
    for (uint64_t seed = 0; seed < 100; ++seed) {
      const size_t tokens = task_token_count(make_task_problem(family.name, seed).completion) + 1;
      if (family.name == longest_task_family()) {
        EXPECT_GT(tokens, 4096u);
      } else {
        EXPECT_GE(tokens, 500u) << family.name;
        EXPECT_LE(tokens, 2200u) << family.name;
      }
    }
  }
  const TaskFamily* longest = find_task_family(longest_task_family());
  ASSERT_NE(longest, nullptr);
  for (uint64_t seed = 0; seed < 100; ++seed) {
    const TaskProblem p = make_task_problem(longest->name, seed, longest->min_size);
    EXPECT_GT(task_token_count(p.completion), 4096u);
  }
}

// No answer can be had by guessing: the most frequent of 2000 stays below 2 %.
TEST(Task, AnswersCannotBeGuessed) {
  for (const TaskFamily& family : task_families()) {
    if (family.name == longest_task_family()) continue;  // same answers as rotor
    std::map<std::string, int> count;
    int top = 0;
    for (uint64_t seed = 0; seed < 2000; ++seed) {
      top = std::max(top, ++count[make_task_problem(family.name, seed).answer]);
    }
    EXPECT_LT(top, 40) << family.name;
  }
}

TEST(Task, SeedFamilyAndSizeAllMatter) {
  EXPECT_NE(make_task_problem("walk", 0).prompt, make_task_problem("walk", 1).prompt);
  EXPECT_NE(make_task_problem("walk", 0).prompt.substr(5), make_task_problem("rotor", 0).prompt.substr(6));
  EXPECT_NE(make_task_problem("sum", 0, 20).prompt.substr(0, 20),
            make_task_problem("sum", 0, 21).prompt.substr(0, 20));
  EXPECT_EQ(make_task_problem("sum", 0).prompt, make_task_problem("sum", 0, 100).prompt);
}

TEST(Task, RefusesWhatDoesNotExist) {
  EXPECT_EQ(find_task_family("nope"), nullptr);
  EXPECT_THROW(make_task_problem("nope", 0), std::invalid_argument);
  EXPECT_THROW(make_task_problem("sum", 0, 2), std::invalid_argument);
  EXPECT_THROW(make_task_problem("sum", 0, 301), std::invalid_argument);
  EXPECT_THROW(make_task_problem("sum", 0, -1), std::invalid_argument);
}

TEST(Task, JudgesGeneratedText) {
  const TaskProblem p = make_task_problem("sum", 5);
  EXPECT_TRUE(answer_is_right(p, p.completion));
  EXPECT_TRUE(answer_is_right(p, p.completion + "<|end|>"));
  EXPECT_TRUE(answer_is_right(p, p.completion + "<|end|>and more"));
  EXPECT_TRUE(answer_is_right(p, "<think>nothing of use</think>" + p.answer));
  EXPECT_FALSE(answer_is_right(p, p.completion + "1<|end|>"));
  EXPECT_FALSE(answer_is_right(p, p.answer));
  EXPECT_FALSE(answer_is_right(p, ""));
  EXPECT_EQ(extract_answer("<think>x</think>12,b<|end|>7"), "12,b");
  EXPECT_EQ(extract_answer("<think>a</think>1</think>2\n"), "2");
  EXPECT_EQ(extract_answer("<think>12"), "");
  EXPECT_EQ(task_token_count("<think>ab</think>1<|end|>"), 6u);
}

TEST(TaskRng, DrawsAreInRangeAndUnbiased) {
  TaskRng rng(7);
  std::array<int, 3> count{};
  for (int i = 0; i < 30000; ++i) ++count[rng.below(3)];
  for (int c : count) EXPECT_NEAR(c, 10000, 400);
  for (int i = 0; i < 1000; ++i) {
    const int x = rng.between(-3, 5);
    EXPECT_GE(x, -3);
    EXPECT_LE(x, 5);
  }
  std::vector<int> d = rng.distinct(1, 10, 10);
  std::sort(d.begin(), d.end());
  EXPECT_EQ(d, (std::vector<int>{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}));
  EXPECT_EQ(TaskRng(0).next(), 0xe220a8397b1dcdafull);  // the published first output of SplitMix64 for seed 0
}

TEST(TaskCapi, GivesTheSameProblems) {
  ASSERT_EQ(kvlapse_task_family_count(), static_cast<int>(task_families().size()));
  int sizes[3];
  EXPECT_STREQ(kvlapse_task_family(0, sizes), "sum");
  EXPECT_EQ(sizes[2], 100);
  EXPECT_EQ(kvlapse_task_family(-1, sizes), nullptr);
  EXPECT_EQ(kvlapse_task_family(99, nullptr), nullptr);
  const TaskProblem p = make_task_problem("sort", 9);
  std::string text(8192, '\0');
  int64_t lengths[3];
  const int64_t total = kvlapse_task_make("sort", 9, 0, text.data(), 8192, lengths);
  ASSERT_EQ(total, lengths[0] + lengths[1] + lengths[2]);
  EXPECT_EQ(text.substr(0, static_cast<size_t>(total)), p.prompt + p.completion + p.answer);
  std::string small(10, 'x');
  EXPECT_EQ(kvlapse_task_make("sort", 9, 0, small.data(), 10, lengths), total);
  EXPECT_EQ(small, "xxxxxxxxxx");
  EXPECT_EQ(kvlapse_task_make("nope", 9, 0, text.data(), 8192, lengths), -1);
  EXPECT_EQ(kvlapse_task_make("sum", 9, 1, text.data(), 8192, lengths), -1);
}

}  // namespace
}  // namespace kvlapse
