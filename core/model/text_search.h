// Search in a text: substring (letters of ASCII without regard to case) or PCRE2 pattern. Thread-safe.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

namespace kvlapse {

struct TextMatch {
  size_t begin = 0, end = 0;  // bytes, half open
};

// Matches in order, not overlapping, at most `most`. Throws Error for a wrong pattern, naming the place.
std::vector<TextMatch> find_text(std::string_view text, std::string_view pattern, bool regex,
                                 size_t most = 100000);

}  // namespace kvlapse
