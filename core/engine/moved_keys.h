// MovedKeys: positions inside the cache (StreamingLLM). Rotary attention depends on differences of positions
// alone, so the newest token may keep its own position: a held key then stands as many positions later as
// tokens behind it were evicted, and only keys in front of an evicted token move. Owned by a CacheSite.
#pragma once

#include <span>
#include <vector>

#include "core/policy/plan.h"

namespace kvlapse {

struct MovedKey {
  Pos pos{0};                 // of the token
  Slot slot{0};               // where it will lie when the next token is stored
  int shift = 0;              // positions that it stands later
  std::vector<float> own;     // [D] its key as stored, rotated to `pos`
  std::vector<float> turned;  // [D] the same rotated to pos + shift, rounded to the cache's dtype
};

class MovedKeys {
 public:
  // rope_theta: base of the half-split rotation.
  MovedKeys(const CacheGeometry& geometry, double rope_theta);

  // Takes note of a plan before it is applied: `table` is the one that it was made for, `inputs` answers for
  // its slots.
  void apply(const EvictionPlan& plan, const SlotTable& table, LayerInputs& inputs);
  // By position.
  std::span<const MovedKey> of(int kv_head) const { return heads_[static_cast<size_t>(kv_head)].moved; }

 private:
  struct Head {
    std::vector<MovedKey> moved;
    int last_evicted = -1;  // highest position so far: every held key below it has moved
  };
  void drop(Head& head, int pos, std::span<const Pos> positions, std::span<const float> keys);
  void turn(MovedKey& key);

  size_t dim_;
  DType dtype_;
  std::vector<double> frequencies_;  // [D/2]
  std::vector<Head> heads_;
  int angles_of_ = 0;  // shift that cos_ and sin_ are of
  std::vector<double> cos_, sin_;
};

}  // namespace kvlapse
