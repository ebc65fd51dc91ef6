#include "replay/views/replayed_life.h"

#include "replay/replay_engine.h"
#include "replay/trace_rows.h"

namespace kvlapse {

LayerLife replay_layer_life(const TraceReader& reader, int sequence, int layer,
                            const std::string& policy_spec, const std::string& budget,
                            const std::function<bool()>& cancelled) {
  const TraceRows rows(reader);
  ReplayOptions options;
  options.threads = 1;  // in the background of something else
  options.layer_begin = layer;
  options.layer_end = layer + 1;
  options.progress = [&](int, int) { return !cancelled || !cancelled(); };
  ReplayConfig config;
  config.policy = make_policy(policy_spec);
  config.budget = parse_budget(budget).slots(rows.sequence(sequence).n_tokens);

  LayerLife life;
  life.sequence = sequence, life.layer = layer;
  life.n_kv_heads = reader.header().geometry.n_kv_heads;
  life.n_steps = rows.sequence(sequence).n_tokens;
  life.n_prompt = rows.sequence(sequence).n_prompt;
  const size_t cells = static_cast<size_t>(life.n_kv_heads) * life.n_steps;
  life.evicted_at.assign(cells, kHeldToEnd);
  life.drop_index.assign(cells, -1);
  const ReplayEngine engine(rows, options);
  engine.decide(sequence, {config}, [&](size_t, int, const EvictionPlan& plan) {
    for (const Drop& drop : plan.drops) {
      TraceEviction record;
      record.step = raw(plan.step), record.pos = raw(drop.pos), record.slot = raw(drop.slot);
      record.kv_head = static_cast<int16_t>(drop.kv_head);
      record.reason = plan.reason, record.score = drop.score, record.parts = drop.parts;
      const size_t row =
          drop.kv_head == kWholeLayer || plan.threshold.size() == 1 ? 0 : static_cast<size_t>(drop.kv_head);
      record.threshold = row < plan.threshold.size() ? plan.threshold[row] : 0;
      add_drop(life, record);
    }
  });
  return life;
}

}  // namespace kvlapse
