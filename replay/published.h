// Throughput that papers published, as data, and a profile fitted to a few of their rows, so that the
// throughput model can be held against the rest. Nothing here is a measurement of ours.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "replay/throughput_model.h"

namespace kvlapse {

struct PublishedRow {
  int n_output;             // tokens generated
  std::string_view policy;  // spec
  int budget;               // slots, 0: full
  int batch;
  double tokens_per_s;
  bool calibrates;  // used for the fit; its prediction is no test
};

struct PublishedTable {
  std::string_view name;  // "rkv"
  std::string_view source;
  std::string_view model, gpu;
  DecoderShape shape;
  double memory_gib;
  double weight_read_gbps;  // data sheet
  int n_prompt;
  std::span<const PublishedRow> rows;
};

// R-KV's README table: DeepSeek-R1-Distill-Llama-8B on an A100 80GB.
PublishedTable published_rkv();

// Step overhead, cost per sequence and K/V bandwidth by least squares of relative step time over the
// calibrating rows; `error` of each is its standard error from these rows' residuals.
GpuProfile fit_profile(const PublishedTable& table);

struct ReproducedRow {
  PublishedRow published;
  Prediction prediction;
  double difference_ratio = 0;  // predicted / published - 1
};
std::vector<ReproducedRow> reproduce(const PublishedTable& table, const GpuProfile& profile);

// LongFlow's claim: throughput at the largest batch that fits, relative to the full cache's, on one A100 40GB
// with Qwen3-1.7B, 512 tokens in, 16K out, budget 3200. Computed from bytes under `profile`.
struct RatioClaim {
  std::string_view against;  // policy spec
  double published = 0, predicted = 0;
  int batch = 0;  // predicted largest batch of `against`
};
struct LongFlowClaim {
  int batch = 0;  // predicted largest batch of LongFlow
  Prediction longflow;
  std::vector<RatioClaim> ratios;
};
LongFlowClaim reproduce_longflow(GpuProfile profile);

}  // namespace kvlapse
