#include "kernels/gpu/gpu_backend.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/base/error.h"
#include "core/base/row_math.h"
#include "core/base/vector_math.h"
#include "core/model/tensor_file.h"
#include "kernels/cpu/sampler.h"

namespace kvlapse {
namespace {

constexpr uint64_t kFloat = sizeof(float);
constexpr int kLeastSlots = 256;  // of a captured step: it is captured anew whenever the slots double

bool is_float(TensorType type) {
  return type == TensorType::f32 || type == TensorType::f16 || type == TensorType::bf16;
}

}  // namespace

void GpuBackend::HostBlock::resize(DeviceApi& device, size_t n) {
  release();
  data = device.allocate_host(n);
  api = &device;
  bytes = n;
}
void GpuBackend::HostBlock::release() {
  if (data) api->release_host(data);
  data = nullptr;
}

exact::Heads GpuBackend::heads() const {
  return {w_->n_q_heads, w_->n_kv_heads, w_->head_dim, kv_dtype_};
}

GpuBackend::DeviceMatrix GpuBackend::upload(const Matrix& matrix) {
  DeviceMatrix out;
  out.rows = static_cast<int>(matrix.rows);
  out.type = matrix.type == TensorType::f16    ? DType::f16
             : matrix.type == TensorType::bf16 ? DType::bf16
                                               : DType::f32;
  const size_t elements = static_cast<size_t>(matrix.rows) * static_cast<size_t>(matrix.columns);
  weights_.emplace_back(*api_, elements * dtype_bytes(out.type));
  out.data = weights_.back().data();
  if (is_float(matrix.type)) {
    api_->upload(weights_.back().data(), matrix.data, matrix.bytes());
    return out;
  }
  // The CPU multiplies quantised rows as their fp32 values.
  constexpr int64_t kRows = 256;
  std::vector<float> values(static_cast<size_t>(kRows * matrix.columns));
  for (int64_t row = 0; row < matrix.rows; row += kRows) {
    const int64_t n = std::min(kRows, matrix.rows - row) * matrix.columns;
    dequantize(matrix.type, matrix.row(row), n, values.data());
    api_->upload(weights_.back().data() + static_cast<size_t>(row * matrix.columns) * kFloat, values.data(),
                 static_cast<size_t>(n) * kFloat);
  }
  return out;
}

const float* GpuBackend::upload(const std::vector<float>& values) {
  if (values.empty()) return nullptr;
  weights_.emplace_back(*api_, values.size() * kFloat);
  api_->upload(weights_.back().data(), values.data(), values.size() * kFloat);
  return reinterpret_cast<const float*>(weights_.back().data());
}

GpuBackend::Description GpuBackend::describe_at(std::byte* base, size_t* bytes) const {
  const size_t rows = static_cast<size_t>(capacity_), all = rows * layers_.size();
  const size_t half = static_cast<size_t>(w_->head_dim) / 2;
  size_t used = 0;
  auto take = [&]<class T>(T*& field, size_t n) {
    field = reinterpret_cast<T*>(base + used);
    used += (n * sizeof(T) + 255) / 256 * 256;
  };
  Description d;
  take(d.sites, all);
  take(d.slots, all * w_->n_kv_heads);
  take(d.counts, all * w_->n_kv_heads);
  take(d.ring, all);
  take(d.first_free, all);
  take(d.last_free, all);
  take(d.tokens, rows);
  take(d.pos, rows);
  take(d.rows, rows);
  take(d.forced, rows);
  take(d.cos, rows * half);
  take(d.sin, rows * half);
  if (bytes) *bytes = used;
  return d;
}

void GpuBackend::prepare(const TransformerWeights& weights, int n_rows, DType kv_dtype) {
  if (kv_dtype == DType::f8e4m3)
    fail("kv dtype: expected fp32, fp16 or bf16 with sums in the CPU's order, found fp8");
  if (weights.n_q_heads / weights.n_kv_heads > exact::kMaxGroup)
    fail("cuda: query heads per kv head: expected at most {}, found {}", exact::kMaxGroup,
         weights.n_q_heads / weights.n_kv_heads);
  api_->forget_graphs();
  of_graphs_.clear();
  w_ = &weights;
  kv_dtype_ = kv_dtype;
  capacity_ = n_rows;
  weights_.clear();
  layers_.clear();
  embedding_ = upload(weights.embedding);
  head_ = weights.head.data == weights.embedding.data ? embedding_ : upload(weights.head);
  final_norm_ = upload(weights.final_norm);
  for (const LayerWeights& l : weights.layers)
    layers_.push_back({upload(l.q), upload(l.k), upload(l.v), upload(l.o), upload(l.gate), upload(l.up),
                       upload(l.down), upload(l.input_norm), upload(l.ffn_norm), upload(l.q_norm),
                       upload(l.k_norm), upload(l.q_bias), upload(l.k_bias), upload(l.v_bias)});

  const auto rows = static_cast<size_t>(n_rows), width = static_cast<size_t>(weights.width);
  const size_t ffn = static_cast<size_t>(weights.ffn_width), n_layers = layers_.size();
  const size_t q_width = static_cast<size_t>(weights.n_q_heads) * weights.head_dim;
  const size_t kv_width = static_cast<size_t>(weights.n_kv_heads) * weights.head_dim;
  x_ = DeviceArray<float>(*api_, rows * width);
  normed_ = DeviceArray<float>(*api_, rows * width);
  q_ = DeviceArray<float>(*api_, n_layers * rows * q_width);
  k_ = DeviceArray<float>(*api_, n_layers * rows * kv_width);
  v_ = DeviceArray<float>(*api_, n_layers * rows * kv_width);
  attended_ = DeviceArray<float>(*api_, rows * q_width);
  gate_ = DeviceArray<float>(*api_, rows * ffn);
  up_ = DeviceArray<float>(*api_, rows * ffn);
  logits_ = DeviceArray<float>();
  victims_ = DeviceArray<exact::Victim>(*api_, n_layers * rows * weights.n_kv_heads);
  choices_ = DeviceArray<exact::Choice>(*api_, rows);
  choices_host_.resize(*api_, rows * sizeof(exact::Choice));
  rows_host_.resize(*api_, n_layers * rows * (q_width + 2 * kv_width) * kFloat);
  victims_host_.resize(*api_, victims_.size() * sizeof(exact::Victim));
  size_t bytes = 0;
  alignas(256) static std::byte nowhere;
  describe_at(&nowhere, &bytes);
  description_memory_ = DeviceArray<std::byte>(*api_, bytes);
  description_host_.resize(*api_, bytes);
  device_ = describe_at(description_memory_.data());
  host_ = describe_at(static_cast<std::byte*>(description_host_.data));
  step_stores_.assign(n_layers * rows, nullptr);
  pending_.clear();
  n_rows_ = n_logits_ = n_expected_ = 0;
}

std::unique_ptr<KvStore> GpuBackend::make_kv_store(const CacheGeometry& geometry, int query_window) {
  return std::make_unique<GpuKvStore>(*this, *api_, geometry, query_window);
}

std::byte* GpuBackend::scratch(size_t bytes) {
  if (scratch_.size() < bytes) scratch_ = DeviceArray<std::byte>(*api_, std::max(bytes, 2 * scratch_.size()));
  return scratch_.data();
}

// Elements [offset, offset + n) of a field to the device, for launches outside a queued step.
template <class T>
void GpuBackend::send(T* Description::*field, size_t offset, size_t n) {
  api_->upload(device_.*field + offset, host_.*field + offset, n * sizeof(T));
}

float* GpuBackend::layer_q(int layer) const {
  return q_.data() + static_cast<size_t>(layer) * n_rows_ * w_->n_q_heads * w_->head_dim;
}
float* GpuBackend::layer_k(int layer) const {
  return k_.data() + static_cast<size_t>(layer) * n_rows_ * w_->n_kv_heads * w_->head_dim;
}
float* GpuBackend::layer_v(int layer) const {
  return v_.data() + static_cast<size_t>(layer) * n_rows_ * w_->n_kv_heads * w_->head_dim;
}

template <class Args>
void GpuBackend::launch(const Args& args) {
  api_->launch(args);
  LaunchRecord record{Args::kName, 0, launch_layer_, phase_, false};
  uint64_t slot_bytes = 0;
  if constexpr (requires { args.slot_bytes(); })
    slot_bytes = args.slot_bytes();
  else
    record.expected_bytes = args.bytes();
  launches_.push_back({std::move(record), slot_bytes});
}

std::vector<LaunchRecord> GpuBackend::take_launches() {
  const size_t heads_of_step = static_cast<size_t>(n_rows_) * w_->n_kv_heads;
  std::vector<LaunchRecord> records;
  for (auto& [record, slot_bytes] : std::exchange(launches_, {})) {
    if (slot_bytes > 0 && queued_ && record.layer >= 0)
      for (size_t i = 0; i < heads_of_step; ++i)
        record.expected_bytes +=
            slot_bytes *
            static_cast<uint64_t>(host_.counts[static_cast<size_t>(record.layer) * heads_of_step + i]);
    records.push_back(std::move(record));
  }
  return records;
}

OpBytes GpuBackend::embed(std::span<const BatchRow> rows) {
  n_rows_ = static_cast<int>(rows.size());
  queued_ = !rows[0].prompt;
  chooses_ = false;
  n_expected_ = 0;
  most_ = 0;
  host_layer_ = -1;
  launches_.clear();
  launch_layer_ = -1;
  const size_t half = static_cast<size_t>(w_->head_dim) / 2;
  for (size_t r = 0; r < rows.size(); ++r) {
    host_.tokens[r] = rows[r].token;
    host_.pos[r] = raw(rows[r].pos);
    host_.rows[r] = static_cast<int32_t>(r);
    w_->rope.angles(rows[r].pos, {host_.cos + r * half, half}, {host_.sin + r * half, half});
  }
  if (!queued_) {
    const auto n = rows.size();
    send(&Description::tokens, 0, n);
    send(&Description::pos, 0, n);
    send(&Description::cos, 0, n * half);
    send(&Description::sin, 0, n * half);
    run_embed();
  }
  return {rows.size() * w_->embedding.row_bytes(), rows.size() * w_->width * kFloat};
}

void GpuBackend::run_embed() {
  phase_ = "embed";
  launch(exact::EmbedArgs{embedding_.data, embedding_.type, device_.tokens, x_.data(), n_rows_, w_->width});
}

OpBytes GpuBackend::project_qkv(int layer) {
  layer_ = layer;
  if (!queued_) run_qkv(layer);
  const LayerWeights& l = w_->layers[layer];
  const uint64_t outputs = static_cast<uint64_t>(l.q.rows + l.k.rows + l.v.rows);
  return {l.q.bytes() + l.k.bytes() + l.v.bytes() + static_cast<uint64_t>(n_rows_) * w_->width * kFloat,
          n_rows_ * outputs * kFloat};
}

void GpuBackend::run_qkv(int layer) {
  launch_layer_ = layer;
  phase_ = "matmul";
  const DeviceLayer& l = layers_[layer];
  launch(exact::NormArgs{x_.data(), nullptr, l.input_norm, normed_.data(), n_rows_, w_->width, w_->norm_eps});
  exact::MatmulArgs args{};
  const DeviceMatrix* const matrices[3] = {&l.q, &l.k, &l.v};
  float* const outputs[3] = {layer_q(layer), layer_k(layer), layer_v(layer)};
  args.x = normed_.data();
  args.n_x = n_rows_;
  args.columns = w_->width;
  const bool alike = l.q.type == l.k.type && l.q.type == l.v.type;
  for (int p = 0; p < 3; ++p) {
    args.parts[alike ? p : 0] = {matrices[p]->data, outputs[p], matrices[p]->rows, matrices[p]->rows};
    args.type = matrices[p]->type;
    if (!alike || p == 2) launch(args);
  }
  launch(exact::FinishQkvArgs{outputs[0], outputs[1], outputs[2], l.q_bias, l.k_bias, l.v_bias, l.q_norm,
                              l.k_norm, device_.cos, device_.sin, heads(), n_rows_, w_->norm_eps});
}

Backend::QkvRow GpuBackend::qkv_row(int row) const {
  const auto dim = static_cast<size_t>(w_->head_dim), r = static_cast<size_t>(row);
  return {layer_q(layer_) + r * w_->n_q_heads * dim, layer_k(layer_) + r * w_->n_kv_heads * dim,
          layer_v(layer_) + r * w_->n_kv_heads * dim};
}

Backend::QkvRow GpuBackend::host_row(int layer, int row) {
  const size_t q_width = static_cast<size_t>(w_->n_q_heads) * w_->head_dim;
  const size_t kv_width = static_cast<size_t>(w_->n_kv_heads) * w_->head_dim;
  const size_t rows = queued_ ? layers_.size() * static_cast<size_t>(n_rows_) : static_cast<size_t>(n_rows_);
  auto* q = static_cast<float*>(rows_host_.data);
  float* k = q + rows * q_width;
  float* v = k + rows * kv_width;
  if (!queued_ && host_layer_ != layer) {
    api_->download_later(q, layer_q(layer), rows * q_width * kFloat);
    api_->download_later(k, layer_k(layer), rows * kv_width * kFloat);
    api_->download_later(v, layer_v(layer), rows * kv_width * kFloat);
    api_->synchronize();
    host_layer_ = layer;
  }
  const size_t at = queued_ ? static_cast<size_t>(layer) * n_rows_ + row : static_cast<size_t>(row);
  return {q + at * q_width, k + at * kv_width, v + at * kv_width};
}

void GpuBackend::place(GpuKvStore& store, const SlotTable& table, const float* q) {
  const size_t width = static_cast<size_t>(w_->n_q_heads) * w_->head_dim;
  const auto row = static_cast<int>((q - layer_q(layer_)) / static_cast<ptrdiff_t>(width));
  assert(row >= 0 && row < n_rows_);
  const size_t at = queued_ ? static_cast<size_t>(layer_) * n_rows_ + row : static_cast<size_t>(row);
  for (int h = 0; h < w_->n_kv_heads; ++h) host_.slots[at * w_->n_kv_heads + h] = raw(table.next_slot(h));
  host_.sites[at] = store.view();
  if (queued_) {
    const int window = store.query_window();
    host_.ring[at] =
        exact::kKeepsQuery + (window > 0 ? static_cast<int32_t>(store.n_stored() % window) : exact::kNoRing);
    step_stores_[at] = &store;
  } else {
    pending_.push_back({&store, row, store.n_stored()});
  }
}

void GpuBackend::place_pending() {
  if (pending_.empty()) return;
  // Of several tokens of a store only the last leaves its query, and only the last few their place in the
  // ring.
  for (size_t i = pending_.size(); i-- > 0;) {
    GpuKvStore& store = *pending_[i].store;
    const int window = store.query_window(), later = store.in_batch++;
    host_.ring[pending_[i].row] =
        (later == 0 ? exact::kKeepsQuery : 0) +
        (later < window ? static_cast<int32_t>(pending_[i].stored % window) : exact::kNoRing);
  }
  const auto first = static_cast<size_t>(pending_.front().row), n = pending_.size();
  for (size_t i = 0; i < n; ++i) {
    assert(pending_[i].row == static_cast<int>(first + i));
    pending_[i].store->in_batch = 0;
  }
  send(&Description::sites, first, n);
  send(&Description::slots, first * w_->n_kv_heads, n * w_->n_kv_heads);
  send(&Description::ring, first, n);
  run_store(0, static_cast<int>(first), static_cast<int>(n));
  pending_.clear();
}

// Rows [first_row, first_row + n) of the layer in progress; what the description says of them stands under
// `layer`.
void GpuBackend::run_store(int layer, int first_row, int n) {
  const size_t at = static_cast<size_t>(layer) * n_rows_ + first_row;
  const auto dim = static_cast<size_t>(w_->head_dim), row = static_cast<size_t>(first_row);
  const int from = queued_ ? layer : layer_;
  phase_ = "attention";
  launch(exact::StoreArgs{device_.sites + at, layer_q(from) + row * w_->n_q_heads * dim,
                          layer_k(from) + row * w_->n_kv_heads * dim,
                          layer_v(from) + row * w_->n_kv_heads * dim, device_.slots + at * w_->n_kv_heads,
                          device_.pos + row, device_.ring + at, heads(), n});
}

void GpuBackend::run_attend(int layer, int n, int most, float* out) {
  const size_t at = static_cast<size_t>(layer) * n_rows_;
  const exact::AttendArgs args{
      device_.sites + at,           device_.counts + at * w_->n_kv_heads, out, heads(), n, most,
      attention_scale(w_->head_dim)};
  phase_ = "attention";
  launch(exact::LogitsArgs{args});
  launch(exact::SoftmaxArgs{args});
  launch(exact::ValuesArgs{args});
  launch(exact::SumChunksArgs{args});
}

OpBytes GpuBackend::attention_bytes(std::span<const AttendRow> attend) const {
  OpBytes bytes;
  for (const AttendRow& a : attend) {
    for (int h = 0; h < w_->n_kv_heads; ++h)
      bytes.read += static_cast<uint64_t>(a.table->count(h)) * a.store->geometry().head_token_bytes();
    bytes.written += static_cast<uint64_t>(w_->n_q_heads) * w_->head_dim * kFloat;
  }
  return bytes;
}

OpBytes GpuBackend::attend(std::span<const AttendRow> attend) {
  const bool step = queued_ && attend.size() == static_cast<size_t>(n_rows_) && attend[0].row == 0;
  place_pending();
  const size_t base = step ? static_cast<size_t>(layer_) * n_rows_ : 0;
  int most = 0;
  for (size_t i = 0; i < attend.size(); ++i) {
    const AttendRow& a = attend[i];
    assert(a.row == (step ? static_cast<int>(i) : a.row));
    for (int h = 0; h < w_->n_kv_heads; ++h) {
      const int count = a.table->count(h);
      host_.counts[(base + i) * w_->n_kv_heads + h] = count;
      most = std::max(most, count);
    }
    if (step) {
      host_.first_free[base + i] = a.choice.first_free;
      host_.last_free[base + i] = a.choice.last_free;
      if (a.choice.score == FusedScore::contribution) choice_ = a.choice, chooses_ = true;
    }
  }
  if (step) {
    most_ = std::max(most_, most);
    return attention_bytes(attend);
  }
  // Outside a step: one row at a time, whose output goes to its row of the block.
  for (size_t i = 0; i < attend.size(); ++i) {
    auto& store = *static_cast<GpuKvStore*>(attend[i].store);
    host_.sites[0] = store.view();
    std::copy_n(host_.counts + i * w_->n_kv_heads, w_->n_kv_heads, host_.counts);
    send(&Description::sites, 0, 1);
    send(&Description::counts, 0, static_cast<size_t>(w_->n_kv_heads));
    const size_t width = static_cast<size_t>(w_->n_q_heads) * w_->head_dim;
    run_attend(0, 1, most, attend[i].row < 0 ? nullptr : attended_.data() + attend[i].row * width);
    store.attended();
  }
  return attention_bytes(attend);
}

OpBytes GpuBackend::attend_block(KvStore& kv_store, int first_slots) {
  auto& store = static_cast<GpuKvStore&>(kv_store);
  place_pending();
  const auto rows = static_cast<size_t>(n_rows_), width = static_cast<size_t>(w_->n_q_heads) * w_->head_dim;
  const int most = first_slots + n_rows_;
  const size_t stride = std::bit_ceil(static_cast<size_t>(most));
  const size_t chunks = static_cast<size_t>(exact::blocks_for(most, exact::kChunkSlots));
  const size_t row_floats = 2 * stride * w_->n_q_heads + (chunks + 1) * width;
  if (block_scratch_.size() < rows * row_floats * kFloat)
    block_scratch_ = DeviceArray<std::byte>(*api_, rows * row_floats * kFloat);
  for (size_t r = 0; r < rows; ++r) {
    exact::SiteView& site = host_.sites[r] = store.view();
    auto* at = reinterpret_cast<float*>(block_scratch_.data()) + r * row_floats;
    site.logits = at;
    site.weights = at + stride * w_->n_q_heads;
    site.partials = at + 2 * stride * w_->n_q_heads;
    site.output = site.partials + chunks * width;
    site.query = layer_q(layer_) + r * width;
    site.stride = static_cast<int32_t>(stride);
    for (int h = 0; h < w_->n_kv_heads; ++h)
      host_.counts[r * w_->n_kv_heads + h] = first_slots + static_cast<int>(r) + 1;
  }
  send(&Description::sites, 0, rows);
  send(&Description::counts, 0, rows * w_->n_kv_heads);
  run_attend(0, n_rows_, most, attended_.data());
  const uint64_t slots = static_cast<uint64_t>(most);
  return {slots * store.geometry().head_token_bytes() * w_->n_kv_heads, rows * width * kFloat};
}

OpBytes GpuBackend::output_and_ffn(int layer) {
  if (!queued_) run_output_and_ffn(layer);
  const LayerWeights& l = w_->layers[layer];
  const auto rows = static_cast<uint64_t>(n_rows_);
  const uint64_t width = static_cast<uint64_t>(w_->width), ffn = static_cast<uint64_t>(w_->ffn_width);
  return {l.o.bytes() + l.gate.bytes() + l.up.bytes() + l.down.bytes() +
              rows * (static_cast<uint64_t>(l.o.columns) + 2 * width + ffn) * kFloat,
          rows * (2 * width + ffn) * kFloat};
}

void GpuBackend::run_output_and_ffn(int layer) {
  phase_ = "matmul";
  const DeviceLayer& l = layers_[layer];
  auto multiply = [&](const DeviceMatrix& m, const float* x, int columns, float* out, bool add) {
    exact::MatmulArgs args{};
    args.parts[0] = {m.data, out, m.rows, m.rows};
    args.type = m.type;
    args.x = x;
    args.n_x = n_rows_;
    args.columns = columns;
    args.add = add;
    launch(args);
  };
  multiply(l.o, attended_.data(), w_->n_q_heads * w_->head_dim, x_.data(), true);
  launch(exact::NormArgs{x_.data(), nullptr, l.ffn_norm, normed_.data(), n_rows_, w_->width, w_->norm_eps});
  if (l.gate.type == l.up.type) {
    exact::MatmulArgs both{};
    both.parts[0] = {l.gate.data, gate_.data(), l.gate.rows, l.gate.rows};
    both.parts[1] = {l.up.data, up_.data(), l.up.rows, l.up.rows};
    both.type = l.gate.type;
    both.x = normed_.data();
    both.n_x = n_rows_;
    both.columns = w_->width;
    launch(both);
  } else {
    multiply(l.gate, normed_.data(), w_->width, gate_.data(), false);
    multiply(l.up, normed_.data(), w_->width, up_.data(), false);
  }
  launch(exact::SiluArgs{gate_.data(), up_.data(), static_cast<int64_t>(n_rows_) * w_->ffn_width});
  multiply(l.down, gate_.data(), w_->ffn_width, x_.data(), true);
}

void GpuBackend::run_head(int n) {
  launch_layer_ = -1;
  phase_ = "head";
  launch(exact::NormArgs{x_.data(), device_.rows, final_norm_, normed_.data(), n, w_->width, w_->norm_eps});
  exact::MatmulArgs args{};
  args.parts[0] = {head_.data, logits_.data(), w_->n_vocab, w_->n_vocab};
  args.type = head_.type;
  args.x = normed_.data();
  args.n_x = n;
  args.columns = w_->width;
  launch(args);
}

void GpuBackend::expect_samples(std::span<const SampleRow> rows) {
  if (!queued_) return;
  n_expected_ = static_cast<int>(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) host_.forced[i] = rows[i].forced;
}

OpBytes GpuBackend::head(std::span<const int> rows) {
  const auto n = static_cast<int>(rows.size());
  const size_t vocab = static_cast<size_t>(w_->n_vocab);
  if (logits_.size() < rows.size() * vocab) {
    logits_ = DeviceArray<float>(*api_, rows.size() * vocab);
    api_->forget_graphs();
    of_graphs_.clear();
  }
  std::copy(rows.begin(), rows.end(), host_.rows);
  if (queued_) {
    n_logits_ = n;
    if (n_expected_ != n) n_expected_ = 0;
    run_step();
  } else {
    send(&Description::rows, 0, rows.size());
    run_head(n);
  }
  n_logits_ = n;
  logits_mirror_.resize(std::max(logits_mirror_.size(), rows.size() * vocab));
  logits_fresh_.assign(rows.size(), 0);
  return {w_->head.bytes() + rows.size() * w_->width * kFloat, rows.size() * vocab * kFloat};
}

// Everything that the session has asked for since embed().
void GpuBackend::run_step() {
  const int n_layers = static_cast<int>(layers_.size());
  const int n_score_rows = chooses_ && !choice_.shared ? w_->n_kv_heads : 1;
  const int most = static_cast<int>(std::bit_ceil(static_cast<unsigned>(std::max(most_, kLeastSlots))));
  const size_t n_victims = static_cast<size_t>(n_layers) * n_rows_ * n_score_rows;
  const uint64_t key = static_cast<uint64_t>(n_rows_) | static_cast<uint64_t>(n_logits_) << 16 |
                       static_cast<uint64_t>(std::countr_zero(static_cast<unsigned>(most))) << 32 |
                       uint64_t{keeps_rows_} << 40 | uint64_t{chooses_} << 41 |
                       uint64_t{choice_.shared} << 42 | uint64_t{n_expected_ > 0} << 43;
  launches_.clear();
  const auto launch_all = [&] {
    api_->upload_later(description_memory_.data(), description_host_.data, description_host_.bytes);
    run_embed();
    for (int layer = 0; layer < n_layers; ++layer) {
      const size_t at = static_cast<size_t>(layer) * n_rows_;
      run_qkv(layer);
      run_store(layer, 0, n_rows_);
      run_attend(layer, n_rows_, most, attended_.data());
      if (chooses_) {
        phase_ = "evict";
        const int deciding = choice_.shared ? w_->n_q_heads : w_->n_q_heads / w_->n_kv_heads;
        exact::VictimArgs args{};
        args.sites = device_.sites + at;
        args.counts = device_.counts + at * w_->n_kv_heads;
        args.first_free = device_.first_free + at;
        args.last_free = device_.last_free + at;
        args.victims = victims_.data() + at * n_score_rows;
        args.heads = heads();
        args.n_rows = n_rows_;
        args.shared = choice_.shared;
        args.scale = 1.0f / static_cast<float>(deciding * w_->head_dim);
        launch(args);
      }
      run_output_and_ffn(layer);
    }
    run_head(n_logits_);
    if (n_expected_ > 0) {
      run_choose(n_expected_);
      api_->download_later(choices_host_.data, choices_.data(),
                           static_cast<size_t>(n_expected_) * sizeof(exact::Choice));
    }
    if (keeps_rows_) {
      const size_t rows = static_cast<size_t>(n_layers) * n_rows_;
      const size_t q_width = static_cast<size_t>(w_->n_q_heads) * w_->head_dim;
      const size_t kv_width = static_cast<size_t>(w_->n_kv_heads) * w_->head_dim;
      auto* q = static_cast<float*>(rows_host_.data);
      api_->download_later(q, q_.data(), rows * q_width * kFloat);
      api_->download_later(q + rows * q_width, k_.data(), rows * kv_width * kFloat);
      api_->download_later(q + rows * (q_width + kv_width), v_.data(), rows * kv_width * kFloat);
    }
    if (chooses_)
      api_->download_later(victims_host_.data, victims_.data(), n_victims * sizeof(exact::Victim));
  };
  if (singly_)
    launch_all();
  else
    api_->run_graph(key, launch_all);
  if (launches_.empty())
    launches_ = of_graphs_[key];
  else
    of_graphs_[key] = launches_;
  api_->synchronize();
  const auto* victims = static_cast<const exact::Victim*>(victims_host_.data);
  for (size_t i = 0; i < static_cast<size_t>(n_layers) * n_rows_; ++i) {
    std::vector<Lowest> lowest;
    for (int r = 0; chooses_ && r < n_score_rows; ++r) {
      const exact::Victim& v = victims[i * n_score_rows + r];
      lowest.push_back({v.score, v.next, v.slot, v.has_nan != 0});
    }
    step_stores_[i]->attended(std::move(lowest));
  }
}

void GpuBackend::run_choose(int n) {
  launch_layer_ = -1;
  phase_ = "sample";
  launch(exact::ChooseArgs{logits_.data(), device_.forced, choices_.data(), n, w_->n_vocab});
}

void GpuBackend::sample(std::span<const SampleRow> rows, std::span<SampleResult> results) {
  std::vector<exact::Choice> choices(rows.size());
  if (queued_ && n_expected_ == static_cast<int>(rows.size())) {
    std::memcpy(choices.data(), choices_host_.data, rows.size() * sizeof(exact::Choice));
  } else {
    for (size_t i = 0; i < rows.size(); ++i) host_.forced[i] = rows[i].forced;
    send(&Description::forced, 0, rows.size());
    run_choose(static_cast<int>(rows.size()));
    api_->download(choices.data(), choices_.data(), rows.size() * sizeof(exact::Choice));
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].temperature > 0 && rows[i].forced < 0) {
      results[i] = sample_token(logits(static_cast<int>(i)), rows[i], sample_scratch_);
      continue;
    }
    const exact::Choice& c = choices[i];
    const bool is_best = rows[i].forced < 0 || rows[i].forced == c.best;
    const float logit = is_best ? c.best_logit : c.forced_logit;
    const float log_sum = log_over(c.total, softmax_base(c.best_logit + 0.0f));
    results[i] = {is_best ? c.best : rows[i].forced, logit - log_sum,
                  logit - (is_best ? c.second : c.best_logit)};
  }
}

std::span<const float> GpuBackend::logits(int row) {
  const size_t vocab = static_cast<size_t>(w_->n_vocab), at = static_cast<size_t>(row) * vocab;
  if (!logits_fresh_[row]) {
    api_->download(logits_mirror_.data() + at, logits_.data() + at, vocab * kFloat);
    logits_fresh_[row] = 1;
  }
  return {logits_mirror_.data() + at, vocab};
}

std::span<const float> GpuBackend::residual(int row) {
  if (queued_) return {};
  const auto width = static_cast<size_t>(w_->width);
  residual_mirror_.resize(width);
  api_->download(residual_mirror_.data(), x_.data() + row * width, width * kFloat);
  return residual_mirror_;
}

}  // namespace kvlapse
