#include "core/model/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "core/model/model.h"
#include "core/model/prompt.h"
#include "tests/support/error_text.h"
#include "tests/support/smollm2.h"

namespace kvlapse {
namespace {

using testing::error_text;
using ::testing::HasSubstr;

const std::vector<ChatMessage> kQuestion{{"user", " Why? "}};
const std::vector<ChatMessage> kTalk{
    {"system", "Be brief."}, {"user", "Why?"}, {"assistant", "So."}, {"user", "Ah"}};

std::string text(std::string_view source, const std::vector<ChatMessage>& messages) {
  return apply_chat_template(source, messages, "</s>").text;
}

TEST(ChatTemplate, ChatMl) {
  std::string plain =
      "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
      "'<|im_end|>' + "
      "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
  EXPECT_EQ(text(plain, kQuestion), "<|im_start|>user\n Why? <|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(
      text(plain, kTalk),
      "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo."
      "<|im_end|>\n<|im_start|>user\nAh<|im_end|>\n<|im_start|>assistant\n");
  // A system text of the template's own is written when there is none, and only then.
  std::string with_default =
      "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + "
      "'<|im_end|>\\n' }}"
      "{%- else %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}" +
      plain;
  EXPECT_THAT(text(with_default, kQuestion),
              HasSubstr("<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user"));
  EXPECT_EQ(text(with_default, kTalk), text(plain, kTalk));
  // The kind that opens the reasoning itself.
  EXPECT_THAT(text("<|im_end|>{{- '<|im_start|>assistant\\n<think>\\n' }}", kQuestion),
              ::testing::EndsWith("<|im_start|>assistant\n<think>\n"));
}

TEST(ChatTemplate, Llama3) {
  std::string turns =
      "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + "
      "'<|eot_id|>'";
  auto prompt = apply_chat_template(turns + "bos_token", kQuestion, "");
  EXPECT_TRUE(prompt.begins_with_bos);
  EXPECT_EQ(prompt.text,
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_"
            "header_id|>\n\n");
  std::string dated =
      turns + "{{- \"Cutting Knowledge Date: December 2023\\n\" }} {%- set date_string = \"26 Jul 2024\" %}";
  EXPECT_EQ(text(dated, kQuestion),
            "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday "
            "Date: 26 Jul 2024"
            "\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
  EXPECT_THAT(text(dated, kTalk), HasSubstr("26 Jul 2024\n\nBe brief.<|eot_id|>"));
}

TEST(ChatTemplate, DeepSeekLlama2AndZephyr) {
  std::string deepseek =
      "{{'<｜User｜>' + message['content']}} {{'<｜Assistant｜>' + content}} {{'<｜Assistant｜><think>\\n'}}";
  EXPECT_EQ(text(deepseek, {{"user", "Why?"}}), "<｜User｜>Why?<｜Assistant｜><think>\n");
  EXPECT_EQ(
      text(deepseek, {{"system", "S"}, {"user", "A"}, {"assistant", "<think>x</think>B"}, {"user", "C"}}),
      "S<｜User｜>A<｜Assistant｜>B<｜end▁of▁sentence｜><｜User｜>C<｜Assistant｜><think>\n");
  EXPECT_EQ(text("bos_token '[INST] ' '<<SYS>>\\n' ' [/INST]'", kTalk),
            "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST] So. </s>[INST] Ah [/INST]");
  EXPECT_EQ(text("'<|user|>\\n' + eos_token '<|assistant|>'", {{"user", "Why?"}}),
            "<|user|>\nWhy?</s>\n<|assistant|>\n");
}

TEST(ChatTemplate, UnknownOnesAreRefusedWithAdvice) {
  EXPECT_THAT(error_text([] { text("", kQuestion); }), HasSubstr("found none"));
  for (const char* source : {"<start_of_turn>user", "<|im_start|><|im_sep|><|im_end|>",
                             "<｜User｜><｜Assistant｜> thinking <think></think>"})
    EXPECT_THAT(error_text([&] { text(source, kQuestion); }),
                HasSubstr("write the turns into the prompt yourself"));
}

TEST(ChatTemplate, SmolLm2GivesTheGoldenPrompt) {
  KVLAPSE_NEEDS_SMOLLM2();
  ModelFiles model = open_model_files(kSmolLm2);
  auto golden = open_safetensors(KVLAPSE_TEST_DATA "/smollm2/math.safetensors");
  std::string question;
  for (const auto& [key, value] : golden->metadata())
    if (key == "user_message") question = value;
  ASSERT_FALSE(question.empty());
  Prompt prompt = make_prompt(model.spec, *model.tokenizer, question, true);
  const TensorView& bytes = golden->get("prompt_text");
  EXPECT_EQ(prompt.text, std::string(reinterpret_cast<const char*>(bytes.data), bytes.bytes));
  const TensorView& ids = golden->get("prompt_ids");
  ASSERT_EQ(prompt.ids.size() * sizeof(int32_t), ids.bytes);
  EXPECT_EQ(std::memcmp(prompt.ids.data(), ids.data, ids.bytes), 0);
  EXPECT_EQ(model.spec.eos_ids, std::vector<int32_t>{2});
}

}  // namespace
}  // namespace kvlapse
