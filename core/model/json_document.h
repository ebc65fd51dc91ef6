// JSON files of outside origin: parsed and read field by field, with messages of one line that name file,
// field, expected and found. A JsonNode is a view of the document; pure reads, thread-safe.
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvlapse {

// Text of a file as it may stand in a one-line message: control characters replaced, length bounded.
std::string quotable(std::string_view text);

class JsonNode {
 public:
  JsonNode(const nlohmann::json& value, std::string where) : value_(&value), where_(std::move(where)) {}

  const nlohmann::json& value() const { return *value_; }
  const std::string& where() const { return where_; }  // file: field.field
  bool is_null() const { return value_->is_null(); }

  // A member; nullopt when it is absent or null. `get` throws Error instead.
  std::optional<JsonNode> find(std::string_view key) const;
  JsonNode get(std::string_view key) const;
  std::vector<JsonNode> elements() const;  // of an array

  int64_t as_integer(int64_t low = std::numeric_limits<int64_t>::min(),
                     int64_t high = std::numeric_limits<int64_t>::max()) const;
  double as_number() const;
  bool as_bool() const;
  const std::string& as_string() const;

  // Of an optional member.
  bool flag(std::string_view key, bool otherwise) const;
  std::string text(std::string_view key, std::string_view otherwise) const;

  [[noreturn]] void refuse(std::string_view expected) const;  // found: this value

 private:
  const nlohmann::json* value_;
  std::string where_;
};

// Owns the parsed document.
class JsonDocument {
 public:
  // Throws Error naming the file and the byte when it is not JSON.
  explicit JsonDocument(const std::filesystem::path& path);
  JsonNode root() const { return {value_, where_}; }

 private:
  std::string where_;
  nlohmann::json value_;
};

}  // namespace kvlapse
