// AddedTokens: texts that are one token before anything else looks at them: special tokens (<|im_end|>) and
// others that were added to a vocabulary. Leftmost, longest match, exact case. Immutable once built;
// thread-safe.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace kvlapse {

struct AddedToken {
  std::string text;
  int32_t id = 0;
  bool special = false;
  bool strip_left = false, strip_right = false;  // takes the white space beside it
};

class AddedTokens {
 public:
  void add(AddedToken token);
  bool empty() const { return n_tokens_ == 0; }

  // Calls `on_text` for each stretch between tokens (not empty) and `on_token` for each token, in order.
  // Special tokens are text when `parse_special` is false.
  void split(std::string_view text, bool parse_special, const std::function<void(std::string_view)>& on_text,
             const std::function<void(const AddedToken&)>& on_token) const;

 private:
  const AddedToken* match(std::string_view text, size_t at, bool parse_special) const;

  std::array<std::vector<AddedToken>, 256> by_first_byte_;  // longest first
  size_t n_tokens_ = 0;
};

}  // namespace kvlapse
