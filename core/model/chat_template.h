// Chat templates of the common families, recognised by what their Jinja source contains; the source itself is
// not executed. A template that none of them matches is refused, so that no prompt is silently wrong. Pure
// functions.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace kvlapse {

struct ChatMessage {
  std::string role;  // system, user, assistant
  std::string content;
};

struct ChatPrompt {
  std::string text;  // with the opening of the assistant's turn, without the beginning-of-text token
  bool begins_with_bos = false;  // the family puts the beginning-of-text token first
  std::string_view family;       // for people: "ChatML", "Llama 3", ...
};

// `eos` is the text of the end-of-text token, which some families close a turn with. Throws Error with advice
// when the template is unknown or empty.
ChatPrompt apply_chat_template(std::string_view source, std::span<const ChatMessage> messages,
                               std::string_view eos);

// The template of a Hugging Face folder: chat_template.jinja, or the field of tokenizer_config.json. Empty:
// none.
std::string read_chat_template(const std::filesystem::path& folder);

}  // namespace kvlapse
