// The ids that a prompt becomes for a model: its chat template or the tokens that its files put before plain
// text, encoded and checked against the context. Pure functions.
#pragma once

#include <string_view>
#include <vector>

#include "core/model/model_spec.h"
#include "core/model/tokenizer.h"

namespace kvlapse {

struct Prompt {
  std::string text;  // what was encoded, template applied
  std::vector<int32_t> ids;
};

// `chat`: `text` is one user's turn. Throws Error: invalid UTF-8, an unknown template, no tokens, or more
// tokens than the context holds.
Prompt make_prompt(const ModelSpec& spec, const Tokenizer& tokenizer, std::string_view text, bool chat);

}  // namespace kvlapse
