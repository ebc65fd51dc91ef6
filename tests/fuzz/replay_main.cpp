// Drives a fuzz target without libFuzzer: every file of the corpus, then mutations of them for a number of
// seconds. Usage: TARGET SECONDS CORPUS_FOLDER [SEED]. An input that crashes is left in crash_input.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
// Of the sanitizers' run time; absent in a build without them.
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

namespace {

std::string current;

void save_current() {
  std::ofstream("crash_input", std::ios::binary) << current;
}

void run(const std::string& input) {
  current = input;
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(current.data()), current.size());
}

class Mutator {
 public:
  Mutator(const std::vector<std::string>& corpus, uint64_t seed) : corpus_(corpus), random_(seed) {}

  std::string next() {
    std::string input = corpus_[below(corpus_.size())];
    for (size_t n = 1 + below(6); n > 0; --n) mutate(input);
    return input;
  }

 private:
  size_t below(size_t n) { return n == 0 ? 0 : random_() % n; }

  void mutate(std::string& s) {
    constexpr uint64_t kNumbers[] = {0,
                                     1,
                                     2,
                                     0x7f,
                                     0x80,
                                     0xff,
                                     0x7fff,
                                     0xffff,
                                     0x7fffffff,
                                     0x80000000,
                                     0xffffffff,
                                     0x7fffffffffffffff,
                                     0x8000000000000000,
                                     0xffffffffffffffff};
    size_t at = below(s.size() + 1), left = s.size() - at;
    switch (below(7)) {
      case 0:
        if (left > 0) s[at] = static_cast<char>(s[at] ^ (1 << below(8)));
        break;
      case 1:
        if (left > 0) s[at] = static_cast<char>(random_());
        break;
      case 2: s.erase(at, 1 + below(std::min<size_t>(left, 32))); break;
      case 3: s.insert(at, s.substr(below(s.size()), below(64))); break;
      case 4: {  // a number that is near a limit, in one of the widths
        uint64_t value = kNumbers[below(std::size(kNumbers))] + below(3);
        size_t width = size_t{1} << below(4);
        for (size_t i = 0; i < std::min(width, left); ++i) s[at + i] = static_cast<char>(value >> (8 * i));
        break;
      }
      case 5: {
        const std::string& other = corpus_[below(corpus_.size())];
        s = s.substr(0, at) + other.substr(below(other.size()));
        break;
      }
      default: {  // text: digits and punctuation change what JSON means
        constexpr std::string_view kText = "0123456789-+.eE\"[]{},:\\ntfu";
        if (left > 0) s[at] = kText[below(kText.size())];
      }
    }
  }

  const std::vector<std::string>& corpus_;
  std::mt19937_64 random_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s SECONDS CORPUS_FOLDER [SEED]\n", argv[0]);
    return 64;
  }
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(save_current);
  const double seconds = std::atof(argv[1]);
  std::vector<std::string> corpus;
  for (const auto& entry : std::filesystem::directory_iterator(argv[2])) {
    std::ifstream file(entry.path(), std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  if (corpus.empty()) return 2;
  for (const std::string& input : corpus) run(input);
  const uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1;
  Mutator mutator(corpus, seed);
  uint64_t runs = corpus.size();
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds)
    for (int i = 0; i < 64; ++i, ++runs) run(mutator.next());
  std::printf("%llu inputs in %.0f s, seed %llu\n", static_cast<unsigned long long>(runs), seconds,
              static_cast<unsigned long long>(seed));
  return 0;
}
