#include "trace/recorder.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include "core/base/error.h"

namespace kvlapse {

// Adds the time of a callback to `total_ns`.
class Recorder::Timer {
 public:
  explicit Timer(int64_t& total_ns) : total_ns_(total_ns) {}
  ~Timer() { total_ns_ += std::chrono::nanoseconds(std::chrono::steady_clock::now() - start_).count(); }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  int64_t& total_ns_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

Recorder::Recorder(const std::filesystem::path& file, TraceHeader header, TraceWriterOptions options)
    : writer_(file, std::move(header), options) {
  const TraceHeader& h = writer_.header();
  n_prompt_.resize(h.n_sequences);
  evicted_.resize(static_cast<size_t>(h.n_sequences) * h.geometry.n_layers);
  held_.resize(h.geometry.n_kv_heads);
  sketch_.resize(h.geometry.n_kv_heads);
  group_weights_.resize(h.geometry.group());
  group_logits_.resize(h.geometry.group());
}

void Recorder::set_sequence(int sequence, uint64_t seed, int budget_slots) {
  starts_[sequence] = {seed, budget_slots};
}

void Recorder::on_prompt(int sequence, std::span<const int32_t> ids) {
  const Start start = starts_[sequence];
  writer_.begin_sequence(sequence, start.seed, start.budget_slots, ids);
  n_prompt_[sequence] = static_cast<int>(ids.size());
}

void Recorder::on_attended(int sequence, int layer, Pos pos, const TokenRows& rows, const SlotTable& table,
                           LayerInputs& inputs) {
  const bool prompt = raw(pos) < n_prompt_[sequence];
  Timer timer(prompt ? spent_prompt_ns_ : spent_in_step_ns_);
  const TraceHeader& header = writer_.header();
  const int n_heads = header.geometry.n_kv_heads;
  // A prompt passes in blocks, whose tokens may be in the table together; nothing is evicted before its end.
  for (int h = 0; h < n_heads; ++h) held_[h] = prompt ? raw(pos) + 1 : table.count(h);
  LayerRecord record;
  record.held = held_;
  record.rows = &rows;
  if (!prompt && header.has_sketch(layer)) {
    const bool evicted = evicted_[static_cast<size_t>(sequence) * header.geometry.n_layers + layer];
    const int group = header.geometry.group();
    for (int h = 0; h < n_heads; ++h) {
      for (int g = 0; g < group; ++g) {
        group_weights_[g] = inputs.attention(h * group + g);
        group_logits_[g] = inputs.logits(h * group + g);
      }
      sketcher_.sketch(group_weights_, group_logits_, table.positions(h), sketch_[h]);
      sketch_[h].recall = evicted ? std::numeric_limits<float>::quiet_NaN() : 1.0f;
    }
    record.sketch = sketch_;
  }
  writer_.append(sequence, layer, pos, record);
}

void Recorder::on_evicted(int sequence, int layer, const EvictionPlan& plan) {
  Timer timer(raw(plan.step) < n_prompt_[sequence] ? spent_prompt_ns_ : spent_in_step_ns_);
  if (!plan.drops.empty())
    evicted_[static_cast<size_t>(sequence) * writer_.header().geometry.n_layers + layer] = 1;
  writer_.evict(sequence, layer, plan);
}

void Recorder::on_step(const StepSummary& summary) {
  const bool prompt = raw(summary.pos) < n_prompt_[summary.sequence];
  if (!prompt && summary.start_ns != last_start_ns_) {  // sequences of a batch share their step
    last_start_ns_ = summary.start_ns;
    // A device that runs ahead was waited for, whatever the recorder did before.
    const int64_t hidden = std::min(summary.waited_ns, spent_ns_ - settled_ns_);
    decode_ns_ += hidden;
    settled_ns_ = spent_ns_ -= hidden;
    decode_ns_ += summary.total_ns - spent_in_step_ns_;
    spent_ns_ += std::exchange(spent_in_step_ns_, 0);
  }
  Timer timer(prompt ? spent_prompt_ns_ : spent_ns_);
  writer_.step(summary);
}

void Recorder::on_end(int sequence, std::string_view reason) {
  if (n_prompt_[sequence] > 0) writer_.end_sequence(sequence, reason);
}

void Recorder::describe_sequence(const TraceSequence& facts) {
  if (n_prompt_[facts.sequence] > 0) writer_.describe_sequence(facts);
}

double Recorder::overhead_ratio() const {
  return decode_ns_ > 0 ? static_cast<double>(spent_ns_) / static_cast<double>(decode_ns_) : 0;
}

void Recorder::finish(bool interrupted) {
  writer_.finish(interrupted, {{"overhead_ratio", fmt::format("{:.6f}", overhead_ratio())},
                               {"recorder_ns", std::to_string(spent_ns_)},
                               {"recorder_prompt_ns", std::to_string(spent_prompt_ns_)},
                               {"decode_ns", std::to_string(decode_ns_)}});
}

}  // namespace kvlapse
