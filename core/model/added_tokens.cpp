#include "core/model/added_tokens.h"

#include <algorithm>

namespace kvlapse {
namespace {

bool is_blank(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}

}  // namespace

void AddedTokens::add(AddedToken token) {
  if (token.text.empty()) return;
  auto& same_start = by_first_byte_[static_cast<uint8_t>(token.text[0])];
  auto at = std::find_if(same_start.begin(), same_start.end(),
                         [&](const AddedToken& other) { return other.text.size() < token.text.size(); });
  same_start.insert(at, std::move(token));
  ++n_tokens_;
}

const AddedToken* AddedTokens::match(std::string_view text, size_t at, bool parse_special) const {
  for (const AddedToken& token : by_first_byte_[static_cast<uint8_t>(text[at])])
    if ((parse_special || !token.special) && text.substr(at).starts_with(token.text)) return &token;
  return nullptr;
}

void AddedTokens::split(std::string_view text, bool parse_special,
                        const std::function<void(std::string_view)>& on_text,
                        const std::function<void(const AddedToken&)>& on_token) const {
  size_t pending = 0;
  for (size_t at = 0; at < text.size();) {
    const AddedToken* token = match(text, at, parse_special);
    if (!token) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + token->text.size();
    if (token->strip_left)
      while (begin > pending && is_blank(text[begin - 1])) --begin;
    if (token->strip_right)
      while (end < text.size() && is_blank(text[end])) ++end;
    if (begin > pending) on_text(text.substr(pending, begin - pending));
    on_token(*token);
    pending = at = end;
  }
  if (pending < text.size()) on_text(text.substr(pending));
}

}  // namespace kvlapse
