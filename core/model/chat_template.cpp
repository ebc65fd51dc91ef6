#include "core/model/chat_template.h"

#include <array>
#include <optional>

#include "core/base/error.h"
#include "core/model/json_document.h"
#include "core/model/mapped_file.h"

namespace kvlapse {
namespace {

using Messages = std::span<const ChatMessage>;

bool has(std::string_view source, std::string_view text) {
  return source.find(text) != std::string_view::npos;
}

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kBlank = " \t\n\r\f\v";
  size_t begin = text.find_first_not_of(kBlank);
  return begin == std::string_view::npos ? "" : text.substr(begin, text.find_last_not_of(kBlank) - begin + 1);
}

bool trims_content(std::string_view source) {
  for (std::string_view form : {"content'] | trim", "content']|trim", "content | trim", "content|trim"})
    if (has(source, form)) return true;
  return false;
}

// Jinja sources hold newlines as they are or as \n within a literal.
bool has_line(std::string_view source, std::string_view before, std::string_view after) {
  for (std::string_view newline : {"\n", "\\n"})
    if (has(source, std::string(before).append(newline).append(after))) return true;
  return false;
}

// The text that a ChatML template writes when there is no system message: what stands literally in a system
// turn.
std::optional<std::string> default_system_text(std::string_view source) {
  for (std::string_view opening : {"<|im_start|>system\n", "<|im_start|>system\\n"}) {
    for (size_t at = source.find(opening); at != std::string_view::npos; at = source.find(opening, at + 1)) {
      std::string_view rest = source.substr(at + opening.size());
      size_t end = rest.find("<|im_end|>");
      if (end == std::string_view::npos) continue;
      std::string_view text = rest.substr(0, end);
      if (!text.empty() && text.find_first_of("'\"{}\\") == std::string_view::npos) return std::string(text);
    }
  }
  return std::nullopt;
}

// SmolLM2, Qwen2, Qwen2.5, Qwen3, QwQ and many others.
std::optional<ChatPrompt> chatml(std::string_view source, Messages messages, std::string_view) {
  if (!has(source, "<|im_start|>") || !has(source, "<|im_end|>")) return std::nullopt;
  for (std::string_view other : {"<|im_sep|>", "strftime_now", "<|start_header_id|>", "[INST]"})
    if (has(source, other)) return std::nullopt;
  ChatPrompt prompt{.text = {}, .begins_with_bos = has(source, "bos_token"), .family = "ChatML"};
  if (auto system = default_system_text(source); system && (messages.empty() || messages[0].role != "system"))
    prompt.text = fmt::format("<|im_start|>system\n{}<|im_end|>\n", *system);
  bool trim = trims_content(source);
  for (const ChatMessage& m : messages)
    prompt.text +=
        fmt::format("<|im_start|>{}\n{}<|im_end|>\n", m.role, trim ? trimmed(m.content) : m.content);
  prompt.text += "<|im_start|>assistant\n";
  // A template that opens the reasoning itself, as QwQ's; Qwen3 leaves that to the model.
  if (has_line(source, "<|im_start|>assistant\\n<think>", "'") ||
      has_line(source, "<|im_start|>assistant\n<think>", "'"))
    prompt.text += "<think>\n";
  return prompt;
}

// Llama 3 writes turns only; from 3.1 on a system turn with two dates always comes first. 3.2 asks for
// today's date where the host offers one; a recording must not depend on the day, so its fallback is used.
std::optional<ChatPrompt> llama3(std::string_view source, Messages messages, std::string_view) {
  if (!has(source, "<|start_header_id|>") || !has(source, "<|end_header_id|>") || !has(source, "<|eot_id|>"))
    return std::nullopt;
  constexpr std::string_view kDates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
  bool dated = has(source, "Cutting Knowledge Date");
  if (dated && (!has(source, "Cutting Knowledge Date: December 2023") || !has(source, "26 Jul 2024")))
    return std::nullopt;
  ChatPrompt prompt{.text = {}, .begins_with_bos = true, .family = dated ? "Llama 3.1" : "Llama 3"};
  auto turn = [&](std::string_view role, std::string_view before, std::string_view content) {
    prompt.text += fmt::format("<|start_header_id|>{}<|end_header_id|>\n\n{}{}<|eot_id|>", role, before,
                               trimmed(content));
  };
  if (dated && (messages.empty() || messages[0].role != "system")) turn("system", kDates, "");
  for (size_t i = 0; i < messages.size(); ++i)
    turn(messages[i].role, dated && i == 0 && messages[i].role == "system" ? kDates : "",
         messages[i].content);
  prompt.text += "<|start_header_id|>assistant<|end_header_id|>\n\n";
  return prompt;
}

// DeepSeek-R1 and its distillations; later models of the house choose the mode by a variable and are not
// these.
std::optional<ChatPrompt> deepseek(std::string_view source, Messages messages, std::string_view) {
  constexpr std::string_view kUser = "<｜User｜>", kAssistant = "<｜Assistant｜>",
                             kEnd = "<｜end▁of▁sentence｜>";
  if (!has(source, kUser) || !has(source, kAssistant)) return std::nullopt;
  std::string opening = std::string(kAssistant) + "<think>";
  bool thinks = has_line(source, opening, "");
  if (!thinks && has(source, "<think>")) return std::nullopt;
  ChatPrompt prompt{.text = {}, .begins_with_bos = true, .family = "DeepSeek-R1"};
  for (const ChatMessage& m : messages)
    if (m.role == "system") prompt.text = m.content;
  for (const ChatMessage& m : messages) {
    if (m.role == "user") prompt.text.append(kUser).append(m.content);
    if (m.role == "assistant") {
      size_t thought = m.content.rfind("</think>");
      prompt.text.append(kAssistant)
          .append(thought == std::string::npos ? m.content : m.content.substr(thought + 8))
          .append(kEnd);
    }
  }
  prompt.text.append(thinks ? opening + "\n" : std::string(kAssistant));
  return prompt;
}

// TinyLlama and Zephyr.
std::optional<ChatPrompt> zephyr(std::string_view source, Messages messages, std::string_view eos) {
  if (!has_line(source, "<|user|>", "") || !has(source, "<|assistant|>") || !has(source, "eos_token") ||
      has(source, "<|end|>"))
    return std::nullopt;
  ChatPrompt prompt{.text = {}, .begins_with_bos = false, .family = "Zephyr"};
  for (const ChatMessage& m : messages) prompt.text += fmt::format("<|{}|>\n{}{}\n", m.role, m.content, eos);
  prompt.text += "<|assistant|>\n";
  return prompt;
}

// Llama 2: one user turn, with or without a system text. Longer conversations alternate and need each
// answer's end.
std::optional<ChatPrompt> llama2(std::string_view source, Messages messages, std::string_view eos) {
  if (!has(source, "[INST]") || !has(source, "<<SYS>>")) return std::nullopt;
  ChatPrompt prompt{.text = {}, .begins_with_bos = true, .family = "Llama 2"};
  std::string system;
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& m = messages[i];
    if (m.role == "system") {
      system = fmt::format("<<SYS>>\n{}\n<</SYS>>\n\n", m.content);
    } else if (m.role == "user") {
      prompt.text += fmt::format("[INST] {} [/INST]", trimmed(system + m.content));
      system.clear();
    } else {
      prompt.text += fmt::format(" {} {}", trimmed(m.content), eos);
    }
  }
  return prompt;
}

constexpr std::array kFamilies{chatml, llama3, deepseek, zephyr, llama2};

std::string file_text(const std::filesystem::path& path) {
  MappedFile file(path);
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

}  // namespace

ChatPrompt apply_chat_template(std::string_view source, Messages messages, std::string_view eos) {
  if (source.empty())
    fail(
        "chat template: expected one in the model's files, found none: write the turns into the prompt "
        "yourself");
  for (auto family : kFamilies)
    if (auto prompt = family(source, messages, eos)) return *prompt;
  fail(
      "chat template: expected ChatML, Llama 2, Llama 3, DeepSeek-R1 or Zephyr, found another one ({} "
      "bytes): write the "
      "turns into the prompt yourself, special tokens in it are recognised",
      source.size());
}

std::string read_chat_template(const std::filesystem::path& folder) {
  if (auto path = folder / "chat_template.jinja"; std::filesystem::exists(path)) return file_text(path);
  auto path = folder / "tokenizer_config.json";
  if (!std::filesystem::exists(path)) return {};
  JsonDocument document(path);
  auto found = document.root().find("chat_template");
  if (!found) return {};
  if (found->value().is_string()) return found->as_string();
  for (const JsonNode& one : found->elements())  // several, by name
    if (one.get("name").as_string() == "default") return one.get("template").as_string();
  return {};
}

}  // namespace kvlapse
