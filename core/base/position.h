// A token's position in the sequence and a slot of the cache are both small integers and never the same
// thing: after the first eviction slot order is arbitrary. Distinct types keep them apart.
#pragma once

#include <cstdint>

namespace kvlapse {

enum class Pos : int32_t {};   // token position, 0-based, in prompt + generation; keys keep it for life
enum class Slot : int32_t {};  // index of a K/V row within one (sequence, layer, kv head)

inline constexpr Pos kNoPos{-1};

constexpr int32_t raw(Pos pos) {
  return static_cast<int32_t>(pos);
}
constexpr int32_t raw(Slot slot) {
  return static_cast<int32_t>(slot);
}

}  // namespace kvlapse
