#include "trace/views/timeline.h"

#include <algorithm>
#include <cmath>

#include "core/base/error.h"
#include "trace/views/kernel_view.h"

namespace kvlapse {

Timeline read_timeline(const TraceReader& reader, int sequence) {
  Timeline timeline;
  const TraceSequence facts = reader.sequence(sequence);
  const CacheGeometry& geometry = reader.header().geometry;
  timeline.n_prompt = facts.n_prompt;
  timeline.n_steps = reader.n_steps(sequence);

  const auto add_phase = [&](GenerationPhase phase, int begin, int end) {
    end = std::min(end, timeline.n_steps);
    if (begin < end) timeline.phases.push_back({phase, begin, end});
  };
  add_phase(GenerationPhase::prompt, 0, timeline.n_prompt);
  const int think_end = facts.think_begin < 0 ? timeline.n_prompt
                        : facts.think_end < 0 ? timeline.n_steps
                                              : facts.think_end + 1;
  if (facts.think_begin >= 0) add_phase(GenerationPhase::think, timeline.n_prompt, think_end);
  add_phase(GenerationPhase::answer, think_end, timeline.n_steps);

  const std::vector<TraceStep> steps = reader.steps(sequence, 0, timeline.n_steps);
  timeline.first_step = steps.empty() ? timeline.n_prompt : raw(steps.front().summary.pos);
  const double heads = static_cast<double>(geometry.n_layers) * geometry.n_kv_heads;
  const std::vector<int64_t> attention = phase_times(reader, steps, StepPhase::attention),
                             evict = phase_times(reader, steps, StepPhase::evict);
  for (size_t i = 0; i < steps.size(); ++i) {
    const TraceStep& step = steps[i];
    const StepSummary& summary = step.summary;
    const int64_t attention_ns = attention[i], evict_ns = evict[i];
    const double total = std::max<double>(1, static_cast<double>(summary.total_ns));
    timeline.held_tokens.push_back(static_cast<float>(static_cast<double>(step.held_tokens) / heads));
    timeline.evicted_tokens.push_back(static_cast<float>(step.evicted_tokens));
    timeline.step_ms.push_back(static_cast<float>(static_cast<double>(summary.total_ns) * 1e-6));
    timeline.attention_share.push_back(static_cast<float>(static_cast<double>(attention_ns) / total));
    timeline.evict_share.push_back(static_cast<float>(static_cast<double>(evict_ns) / total));
    // Attention read what was held before the step's eviction.
    const double bytes = static_cast<double>(step.held_tokens + step.evicted_tokens) *
                         static_cast<double>(geometry.head_token_bytes());
    timeline.kv_read_mib.push_back(static_cast<float>(bytes / (1 << 20)));
    timeline.kv_gibps.push_back(
        attention_ns > 0 ? static_cast<float>(bytes / static_cast<double>(attention_ns) * 1e9 / (1 << 30))
                         : 0);
    timeline.logprob.push_back(summary.logprob);
    if (static_cast<double>(step.evicted_tokens) > heads) timeline.compactions.push_back(raw(summary.pos));
  }
  return timeline;
}

HeadStates read_head_states(const TraceReader& reader, int sequence, int step) {
  HeadStates states;
  const CacheGeometry& geometry = reader.header().geometry;
  states.n_layers = geometry.n_layers, states.n_kv_heads = geometry.n_kv_heads, states.step = step;
  const size_t cells = static_cast<size_t>(geometry.n_layers) * geometry.n_kv_heads;
  states.held.assign(cells, 0);
  states.evicted.assign(cells, 0);
  states.entropy.assign(cells, NAN);
  states.recall.assign(cells, NAN);
  for (int layer = 0; layer < geometry.n_layers; ++layer) {
    const size_t row = static_cast<size_t>(layer) * geometry.n_kv_heads;
    try {
      reader.read_occupancy(sequence, layer, step, step + 1, states.held.data() + row);
      for (int head = 0; head < geometry.n_kv_heads; ++head)
        states.evicted[row + head] = step + 1 - states.held[row + head];
      if (reader.header().has_sketch(layer)) {
        int first = 0;
        const auto sketches = reader.sketches(sequence, layer, step, step + 1, &first);
        for (size_t head = 0; head < sketches.size(); ++head) {
          states.entropy[row + head] = sketches[head].entropy;
          states.recall[row + head] = sketches[head].recall;
        }
      }
    } catch (const Error&) {
      states.lost_layers.push_back(layer);
      std::fill_n(states.held.begin() + static_cast<std::ptrdiff_t>(row), geometry.n_kv_heads, -1);
      std::fill_n(states.evicted.begin() + static_cast<std::ptrdiff_t>(row), geometry.n_kv_heads, -1);
    }
  }
  return states;
}

std::vector<int32_t> read_head_occupancy(const TraceReader& reader, int sequence, int layer, int kv_head,
                                         int begin, int end) {
  const int n_heads = reader.header().geometry.n_kv_heads;
  begin = std::max(begin, 0);
  end = std::min(end, reader.n_steps(sequence));
  if (begin >= end) return {};
  std::vector<int32_t> all(static_cast<size_t>(end - begin) * n_heads);
  const int n = reader.read_occupancy(sequence, layer, begin, end, all.data());
  std::vector<int32_t> one(n);
  for (int i = 0; i < n; ++i) one[i] = all[static_cast<size_t>(i) * n_heads + kv_head];
  return one;
}

}  // namespace kvlapse
