// GpuBackend: the Backend over a DeviceApi whose sums are taken in the CPU's order, so that tokens, victims
// and traces are the CPU's bit for bit, whatever the batch. A decode step is queued by the session's calls
// and runs in head() as one graph; prefill runs as it is called. K/V may be fp32, fp16 or bf16; weights fp32,
// fp16 or bf16 as they are, quantised ones as fp32.
#pragma once

#include <map>

#include "kernels/gpu/gpu_kv_store.h"

namespace kvlapse {

class GpuBackend final : public Backend {
 public:
  explicit GpuBackend(std::unique_ptr<DeviceApi> api) : api_(std::move(api)) {}

  std::string describe() const override { return api_->describe(); }
  void prepare(const TransformerWeights& weights, int n_rows, DType kv_dtype) override;
  std::unique_ptr<KvStore> make_kv_store(const CacheGeometry& geometry, int query_window) override;
  OpBytes embed(std::span<const BatchRow> rows) override;
  OpBytes project_qkv(int layer) override;
  QkvRow qkv_row(int row) const override;
  bool queues_steps() const override { return true; }
  void keep_rows(bool keep) override { keeps_rows_ = keep; }
  QkvRow host_row(int layer, int row) override;
  OpBytes attend(std::span<const AttendRow> attend) override;
  OpBytes attend_block(KvStore& store, int first_slots) override;
  OpBytes output_and_ffn(int layer) override;
  void expect_samples(std::span<const SampleRow> rows) override;
  OpBytes head(std::span<const int> rows) override;
  void sample(std::span<const SampleRow> rows, std::span<SampleResult> results) override;
  std::span<const float> logits(int row) override;
  std::span<const float> residual(int row) override;
  void parallel(int n, const std::function<void(int)>& task) override {
    for (int i = 0; i < n; ++i) task(i);
  }

  void launch_singly(bool on) override { singly_ = on; }
  std::vector<LaunchRecord> take_launches() override;

  // For the stores: a row to be placed, and placing what is due.
  void place(GpuKvStore& store, const SlotTable& table, const float* q);
  void place_pending();
  // Device memory for n bytes, kept; for one use at a time.
  std::byte* scratch(size_t bytes);

 private:
  struct DeviceMatrix {
    const void* data = nullptr;
    DType type = DType::f32;
    int rows = 0;
  };
  struct DeviceLayer {
    DeviceMatrix q, k, v, o, gate, up, down;
    const float *input_norm, *ffn_norm, *q_norm, *k_norm, *q_bias, *k_bias, *v_bias;
  };
  struct Pending {
    GpuKvStore* store;
    int row;
    int64_t stored;  // tokens that the store held before
  };
  // What a step, or a launch of prefill, is told: one block of memory on each side.
  struct Description {
    exact::SiteView* sites = nullptr;                                               // [L, R]
    int32_t* slots = nullptr;                                                       // [L, R, H]
    int32_t* counts = nullptr;                                                      // [L, R, H]
    int32_t* ring = nullptr;                                                        // [L, R]
    int32_t* first_free = nullptr;                                                  // [L, R]
    int32_t* last_free = nullptr;                                                   // [L, R]
    int32_t *tokens = nullptr, *pos = nullptr, *rows = nullptr, *forced = nullptr;  // [R]
    float *cos = nullptr, *sin = nullptr;                                           // [R, D/2]
  };
  // Host memory that copies run at full speed from and to.
  struct HostBlock {
    DeviceApi* api = nullptr;
    void* data = nullptr;
    size_t bytes = 0;
    HostBlock() = default;
    HostBlock(const HostBlock&) = delete;
    HostBlock& operator=(const HostBlock&) = delete;
    ~HostBlock() { release(); }
    void resize(DeviceApi& device, size_t n);
    void release();
  };

  exact::Heads heads() const;
  DeviceMatrix upload(const Matrix& matrix);
  const float* upload(const std::vector<float>& values);
  Description describe_at(std::byte* base, size_t* bytes = nullptr) const;
  template <class T>
  void send(T* Description::*field, size_t offset, size_t n);
  float* layer_q(int layer) const;
  float* layer_k(int layer) const;
  float* layer_v(int layer) const;
  void run_embed();
  void run_qkv(int layer);
  void run_store(int layer, int first_row, int n);
  void run_attend(int layer, int n, int most, float* out);
  void run_output_and_ffn(int layer);
  void run_head(int n);
  void run_choose(int n);
  void run_step();
  OpBytes attention_bytes(std::span<const AttendRow> attend) const;
  // Launches, and notes it for take_launches().
  template <class Args>
  void launch(const Args& args);

  std::unique_ptr<DeviceApi> api_;
  const TransformerWeights* w_ = nullptr;
  DType kv_dtype_ = DType::f32;
  std::vector<DeviceArray<std::byte>> weights_;
  DeviceMatrix embedding_, head_;
  const float* final_norm_ = nullptr;
  std::vector<DeviceLayer> layers_;

  int capacity_ = 0;  // rows
  int n_rows_ = 0;    // of the step or block in progress
  int layer_ = 0;
  bool queued_ = false, keeps_rows_ = false, chooses_ = false;
  int most_ = 0;  // slots that the queued step attends at most
  FusedChoice choice_;
  DeviceArray<float> x_, normed_, q_, k_, v_, attended_, gate_, up_, logits_;
  DeviceArray<exact::Victim> victims_;  // [L, R, H]
  DeviceArray<exact::Choice> choices_;  // [R]
  HostBlock choices_host_;              // those of the step, when they were expected
  int n_expected_ = 0;                  // rows that the step chooses for
  DeviceArray<std::byte> description_memory_, scratch_, block_scratch_;
  HostBlock description_host_, rows_host_, victims_host_;
  Description device_, host_;
  std::vector<Pending> pending_;
  std::vector<GpuKvStore*> step_stores_;  // [L, R] of the queued step
  std::vector<float> logits_mirror_, residual_mirror_, sample_scratch_;
  std::vector<char> logits_fresh_;
  struct Launch {
    LaunchRecord record;
    uint64_t slot_bytes;  // more for each slot attended
  };
  std::vector<Launch> launches_;                       // since embed()
  std::map<uint64_t, std::vector<Launch>> of_graphs_;  // of a captured step, by its key
  bool singly_ = false;
  std::string_view phase_ = "matmul";
  int launch_layer_ = -1;
  int host_layer_ = -1;  // of prefill whose rows are on the host
  int n_logits_ = 0;
};

}  // namespace kvlapse
