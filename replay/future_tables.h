// FutureTables: what oracles may read of one (sequence, layer): full-cache attention of steps that are still
// to come. Computed from the rows in bounded memory: each table streams the attention rows once or twice,
// running ahead of the replay, and keeps sums by token for the block of steps that configurations work on.
// Tables are made when an oracle first asks for them. Any number of configurations may call at once, as long
// as all of them work on one block of kMetricSteps steps; blocks ascend.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "core/policy/layer_inputs.h"
#include "replay/shared_layer.h"

namespace kvlapse {

class FutureTables final : public FutureInputs {
 public:
  FutureTables(const RowSource& source, int sequence, int layer);
  ~FutureTables() override;

  void mass(int kv_head, Pos step, int horizon, std::span<const Pos> positions,
            std::span<float> out) override;
  // Blocks lie on multiples of `block`: from the one that holds step + 1 to the one that holds step +
  // horizon.
  void peak(int kv_head, Pos step, int horizon, int block, std::span<const Pos> positions,
            std::span<float> out) override;
  void next_use(int kv_head, Pos step, int horizon, float threshold, std::span<const Pos> positions,
                std::span<float> out) override;
  void error(int kv_head, Pos step, int horizon, std::span<const Pos> positions,
             std::span<float> out) override;

  // Of one table, for the engine's accounts.
  static size_t memory_bytes(const CacheGeometry& geometry, int n_tokens);

 private:
  class Stream;   // rows of attention weights or leave-one-out errors, step by step
  class Window;   // sums over (step, step + horizon] for a block of steps
  struct Blocks;  // means over aligned blocks of steps
  struct Uses;    // steps at which a token's weight exceeds a threshold

  Window& window(bool errors, int horizon);

  const RowSource& source_;
  int sequence_, layer_;
  CacheGeometry geometry_;
  int n_tokens_;
  std::mutex mutex_;
  std::map<std::pair<bool, int>, std::unique_ptr<Window>> windows_;
  std::map<int, std::unique_ptr<Blocks>> blocks_;
  std::map<float, std::unique_ptr<Uses>> uses_;
};

}  // namespace kvlapse
