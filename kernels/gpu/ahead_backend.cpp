#include "kernels/gpu/ahead_backend.h"

#include <bit>
#include <chrono>
#include <cmath>
#include <limits>

#include "core/base/error.h"

namespace kvlapse {

// A store of the prompts' backend until decode begins; then the victims of the step that was taken last.
class AheadStore final : public KvStore {
 public:
  AheadStore(std::unique_ptr<KvStore> prompt, int sequence)
      : geometry_(prompt->geometry()), prompt_(std::move(prompt)), sequence_(sequence) {}

  int sequence() const { return sequence_; }
  KvStore& prompt() const {
    if (!prompt_) fail("decode that runs ahead: its cache and attention cannot be read");
    return *prompt_;
  }
  void leave_prompt() { prompt_.reset(); }
  void set_victims(std::span<const uint64_t> keys) {
    lowest_.clear();
    for (const uint64_t key : keys)
      lowest_.push_back({std::bit_cast<float>(static_cast<uint32_t>(key >> 32)),
                         std::numeric_limits<float>::quiet_NaN(),
                         key == ~uint64_t{0} ? -1 : static_cast<int>(static_cast<uint32_t>(key)), false});
  }

  const CacheGeometry& geometry() const override { return geometry_; }
  void store(const SlotTable& table, const float* q, const float* k, const float* v) override {
    if (k) prompt().store(table, q, k, v);  // the device stores its own
  }
  void compact(int kv_head, std::span<const Slot> order) override { prompt().compact(kv_head, order); }
  void replace_key(int kv_head, Slot slot, const float* row) override {
    prompt().replace_key(kv_head, slot, row);
  }
  std::span<const float> logits(int q_head, int n) override { return prompt().logits(q_head, n); }
  std::span<const float> attention(int q_head, int n) override { return prompt().attention(q_head, n); }
  std::span<const float> output(int q_head) override { return prompt().output(q_head); }
  std::span<const float> value_l1(int kv_head, int n) override { return prompt().value_l1(kv_head, n); }
  std::span<const float> keys(int kv_head, int n) override { return prompt().keys(kv_head, n); }
  std::span<const float> values(int kv_head, int n) override { return prompt().values(kv_head, n); }
  std::span<const float> value_row(int kv_head, Slot slot) override {
    return prompt().value_row(kv_head, slot);
  }
  std::span<const float> window_queries(int w) override { return prompt().window_queries(w); }
  std::span<const float> window_logits(const SlotTable& table, int q_head, int w) override {
    return prompt().window_logits(table, q_head, w);
  }
  bool redundancy(const SlotTable& table, int kv_head, float threshold, std::span<float> out) override {
    return prompt().redundancy(table, kv_head, threshold, out);
  }
  const Lowest* fused_lowest(int score_row) override {
    return lowest_.empty() ? nullptr : &lowest_[static_cast<size_t>(score_row)];
  }

 private:
  CacheGeometry geometry_;
  std::unique_ptr<KvStore> prompt_;
  int sequence_;
  std::vector<Lowest> lowest_;
};

namespace {
AheadStore& ahead(KvStore* store) {
  return static_cast<AheadStore&>(*store);
}
}  // namespace

void AheadBackend::prepare(const TransformerWeights& weights, int n_rows, DType kv_dtype) {
  n_layers_ = weights.layers.size();
  if (stores_.size() != n_layers_ * static_cast<size_t>(device_->n_sequences()))
    fail("decode that runs ahead: expected {} sequences, found {}", device_->n_sequences(),
         stores_.size() / n_layers_);
  prompts_->prepare(weights, n_rows, kv_dtype);
}

// A session makes a sequence's stores layer by layer.
std::unique_ptr<KvStore> AheadBackend::make_kv_store(const CacheGeometry& geometry, int query_window) {
  auto store = std::make_unique<AheadStore>(prompts_->make_kv_store(geometry, query_window),
                                            static_cast<int>(stores_.size()) / geometry.n_layers);
  stores_.push_back(store.get());
  return store;
}

OpBytes AheadBackend::embed(std::span<const BatchRow> rows) {
  decoding_ = !rows[0].prompt;
  if (!decoding_) return prompts_->embed(rows);
  rows_.assign(rows.begin(), rows.end());
  attends_.clear();
  return {};
}

OpBytes AheadBackend::project_qkv(int layer) {
  return decoding_ ? OpBytes{} : prompts_->project_qkv(layer);
}

Backend::QkvRow AheadBackend::qkv_row(int row) const {
  return decoding_ ? QkvRow{} : prompts_->qkv_row(row);
}

Backend::QkvRow AheadBackend::host_row(int layer, int row) {
  return decoding_ ? QkvRow{} : prompts_->host_row(layer, row);
}

OpBytes AheadBackend::attend(std::span<const AttendRow> attend) {
  if (decoding_) {
    attends_.insert(attends_.end(), attend.begin(), attend.end());
    return {};
  }
  std::vector<AttendRow> inner(attend.begin(), attend.end());
  for (AttendRow& a : inner) a.store = &ahead(a.store).prompt();
  return prompts_->attend(inner);
}

OpBytes AheadBackend::attend_block(KvStore& store, int first_slots) {
  return prompts_->attend_block(ahead(&store).prompt(), first_slots);
}

OpBytes AheadBackend::output_and_ffn(int layer) {
  return decoding_ ? OpBytes{} : prompts_->output_and_ffn(layer);
}

// The tables hold the first step's tokens already; their rows are the device's to make.
void AheadBackend::begin() {
  std::vector<int32_t> positions(static_cast<size_t>(device_->n_sequences()));
  fed_.assign(positions.size(), 0);
  const size_t n_rows = rows_.size();
  for (size_t i = 0; i < attends_.size(); ++i) {
    AheadStore& store = ahead(attends_[i].store);
    const BatchRow& row = rows_[i % n_rows];
    const SlotTable& table = *attends_[i].table;
    const auto sequence = static_cast<size_t>(store.sequence());
    fed_[sequence] = row.token;
    positions[sequence] = raw(row.pos);
    for (int h = 0; h < table.n_kv_heads(); ++h) {
      const int n = table.count(h) - 1;
      if (raw(table.newest(h)) != n)
        fail("decode that runs ahead: slot of the first token: expected {}, found {}", n,
             raw(table.newest(h)));
      device_->hold({.sequence = store.sequence(),
                     .layer = static_cast<int>(i / n_rows),
                     .kv_head = h,
                     .next = row.pos,
                     .positions = table.positions(h).first(static_cast<size_t>(n)),
                     .keys = store.keys(h, n),
                     .values = store.values(h, n),
                     .value_l1 = store.value_l1(h, n),
                     .first_free = attends_[i].choice.first_free});
    }
  }
  device_->begin(fed_, positions);
  for (AheadStore* store : stores_) store->leave_prompt();
  prompts_.reset();
}

OpBytes AheadBackend::head(std::span<const int> rows) {
  if (!decoding_) return prompts_->head(rows);
  if (prompts_) begin();
  for (; n_queued_ < device_->max_ahead(); ++n_queued_) device_->queue();
  const auto start = std::chrono::steady_clock::now();
  step_ = device_->take();
  waited_ns_ = std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  --n_queued_;
  const size_t n_rows = rows_.size(), n = static_cast<size_t>(device_->victims_a_layer());
  for (size_t i = 0; i < attends_.size(); ++i) {
    AheadStore& store = ahead(attends_[i].store);
    const size_t at = static_cast<size_t>(store.sequence()) * n_layers_ + i / n_rows;
    store.set_victims(step_.victims.subspan(at * n, n));
  }
  return {};
}

void AheadBackend::sample(std::span<const SampleRow> rows, std::span<SampleResult> results) {
  if (!decoding_) return prompts_->sample(rows, results);
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto sequence = static_cast<size_t>(ahead(attends_[i].store).sequence());
    if (rows[i].temperature > 0 || rows[i].forced >= 0 || rows_[i].token != fed_[sequence])
      fail("decode that runs ahead: feeds itself the most likely tokens, found another choice");
    const AheadChoice& choice = step_.choices[sequence];
    if (choice.flags != 0) fail("decode that runs ahead: a step found no slot for its token");
    fed_[sequence] = choice.token;
    results[i] = {choice.token, choice.logprob, choice.margin};
  }
}

std::span<const float> AheadBackend::logits(int row) {
  if (decoding_) fail("decode that runs ahead: its logits cannot be read");
  return prompts_->logits(row);
}

}  // namespace kvlapse
