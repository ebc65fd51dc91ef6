#include "core/model/prompt.h"

#include "core/base/error.h"
#include "core/model/chat_template.h"

namespace kvlapse {

Prompt make_prompt(const ModelSpec& spec, const Tokenizer& tokenizer, std::string_view text, bool chat) {
  Prompt prompt;
  prompt.text = text;
  bool with_prefix = true;
  if (chat) {
    std::string eos = spec.eos_ids.empty() ? "" : std::string(tokenizer.token_bytes(spec.eos_ids[0]));
    const ChatMessage message{"user", std::string(text)};
    ChatPrompt templated = apply_chat_template(spec.chat_template, {&message, 1}, eos);
    prompt.text = std::move(templated.text);
    with_prefix = templated.begins_with_bos;
  }
  if (with_prefix) {
    std::span<const int32_t> prefix = tokenizer.prompt_prefix();
    prompt.ids.assign(prefix.begin(), prefix.end());
  }
  std::vector<int32_t> encoded = tokenizer.encode(prompt.text, SpecialTokens::parse);
  // A prompt that already writes its beginning-of-text token keeps one.
  if (!prompt.ids.empty() && !encoded.empty() && encoded[0] == prompt.ids.back()) prompt.ids.clear();
  prompt.ids.insert(prompt.ids.end(), encoded.begin(), encoded.end());
  if (prompt.ids.empty()) fail("prompt: expected at least one token, found none");
  if (spec.context > 0 && prompt.ids.size() >= static_cast<size_t>(spec.context))
    fail("prompt: expected fewer tokens than the context of {} holds, found {}", spec.context,
         prompt.ids.size());
  return prompt;
}

}  // namespace kvlapse
