// SplitPattern: a regular expression of a pre-tokenizer, compiled with PCRE2 (UTF, Unicode properties, JIT).
// The expressions are written for Rust's and Oniguruma's dialect: white space is Unicode's White_Space,
// letters and numbers are those of Unicode 16, which the pattern is adapted to. Immutable and thread-safe.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace kvlapse {

class SplitPattern {
 public:
  // `source` names the file and field in messages. Throws Error when the expression does not compile.
  SplitPattern(std::string_view expression, std::string_view source);
  ~SplitPattern();
  SplitPattern(SplitPattern&&) noexcept;
  SplitPattern& operator=(SplitPattern&&) noexcept;

  struct Match {
    size_t begin, end;  // begin == end == npos: no further match
  };
  // The next match at or after `from` that is not empty. `text` is valid UTF-8. Throws Error when the
  // expression needs more steps than a sane one does.
  Match find(std::string_view text, size_t from) const;

 private:
  struct Compiled;
  std::unique_ptr<Compiled> compiled_;
};

}  // namespace kvlapse
