#include "core/model/json_document.h"

#include <cmath>

#include "core/base/error.h"
#include "core/model/mapped_file.h"

namespace kvlapse {
namespace {

constexpr size_t kLongestShown = 60;

// One short line, whatever the value is.
std::string shown(const nlohmann::json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return fmt::format("an array of {}", value.size());
  std::string text = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  return text.size() > kLongestShown ? text.substr(0, kLongestShown) + "..." : text;
}

}  // namespace

std::string quotable(std::string_view text) {
  std::string out(text.substr(0, 80));
  for (char& c : out)
    if (static_cast<uint8_t>(c) < 0x20 || c == 0x7f) c = '?';
  return text.size() > out.size() ? out + "..." : out;
}

JsonDocument::JsonDocument(const std::filesystem::path& path) : where_(path.string()) {
  MappedFile file(path);
  const char* begin = reinterpret_cast<const char*>(file.bytes().data());
  try {
    value_ = nlohmann::json::parse(begin, begin + file.bytes().size());
  } catch (const nlohmann::json::parse_error& error) {
    fail("{}: expected JSON, found an error at byte {}", where_, error.byte);
  } catch (const nlohmann::json::exception&) {
    fail("{}: expected JSON, found a number out of range", where_);
  }
}

std::optional<JsonNode> JsonNode::find(std::string_view key) const {
  if (!value_->is_object()) refuse("an object");
  auto found = value_->find(key);
  if (found == value_->end() || found->is_null()) return std::nullopt;
  return JsonNode(*found,
                  fmt::format("{}{}{}", where_, where_.find(": ") == std::string::npos ? ": " : ".", key));
}

JsonNode JsonNode::get(std::string_view key) const {
  if (auto found = find(key)) return *found;
  fail("{}: expected a field '{}', found none", where_, key);
}

std::vector<JsonNode> JsonNode::elements() const {
  if (!value_->is_array()) refuse("an array");
  std::vector<JsonNode> all;
  all.reserve(value_->size());
  for (size_t i = 0; i < value_->size(); ++i)
    all.emplace_back((*value_)[i], fmt::format("{}[{}]", where_, i));
  return all;
}

int64_t JsonNode::as_integer(int64_t low, int64_t high) const {
  bool fits = value_->is_number_integer() &&
              !(value_->is_number_unsigned() &&
                value_->get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()));
  if (!fits || value_->get<int64_t>() < low || value_->get<int64_t>() > high) {
    bool bounded = high != std::numeric_limits<int64_t>::max();
    refuse(bounded ? fmt::format("an integer from {} to {}", low, high) : "an integer");
  }
  return value_->get<int64_t>();
}

double JsonNode::as_number() const {
  if (!value_->is_number() || !std::isfinite(value_->get<double>())) refuse("a number");
  return value_->get<double>();
}

bool JsonNode::as_bool() const {
  if (!value_->is_boolean()) refuse("true or false");
  return value_->get<bool>();
}

const std::string& JsonNode::as_string() const {
  if (!value_->is_string()) refuse("a string");
  return value_->get_ref<const std::string&>();
}

bool JsonNode::flag(std::string_view key, bool otherwise) const {
  auto found = find(key);
  return found ? found->as_bool() : otherwise;
}

std::string JsonNode::text(std::string_view key, std::string_view otherwise) const {
  auto found = find(key);
  return found ? found->as_string() : std::string(otherwise);
}

void JsonNode::refuse(std::string_view expected) const {
  fail("{}: expected {}, found {}", where_, expected, shown(*value_));
}

}  // namespace kvlapse
