#include "core/policy/policies/policies.h"
#include "core/policy/scoring/recency.h"

namespace kvlapse {
namespace {

std::unique_ptr<Policy> with_sinks(PolicyInfo info) {
  info.rule.sinks = static_cast<int>(info.parameters[0].value);
  info.cache_positions = info.parameters[1].value != 0;
  return std::make_unique<Recency>(std::move(info));
}

PolicyInfo periodic(std::string_view reference, std::string_view source) {
  PolicyInfo info = streaming_llm_info();
  info.reference = reference;
  info.source = source;
  info.summary = "the first tokens (attention sinks) and the newest ones, compacted every 128 tokens";
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.rule.reclaim = Reclaim::compact;
  return info;
}

}  // namespace

PolicyInfo streaming_llm_info() {
  PolicyInfo info;
  info.name = "streaming_llm";
  info.summary = "the first tokens (attention sinks) and the newest ones";
  info.formula = "score = position; the first `sinks` positions are protected";
  info.paper = "arXiv 2309.17453";
  info.deviations = {
      "the paper numbers positions inside the cache (positions=cache): the sinks' keys are rotated again as "
      "tokens go; like most reasoning papers the default keeps every key's original rotation",
      "positions=cache keeps the newest token at its own position and moves the keys in front of an evicted "
      "one, which gives the same differences of positions as numbering the cache from 0"};
  info.parameters = {{"sinks", 4, 0, 4096, "first positions that are never evicted"},
                     {"positions", 0, 0, 1, "what attention counts", {"absolute", "cache"}}};
  info.rule.granularity = Granularity::layer;
  info.rule.sinks = 4;
  info.device = DeviceScore::position;
  return info;
}

PolicyInfo streaming_llm_zefan_cai_info() {
  return periodic("zefan-cai", "Zefan-Cai/R-KV d15c976, rkv/compression/streamingllm.py");
}

PolicyInfo streaming_llm_kvpress_info() {
  PolicyInfo info =
      periodic("kvpress", "NVIDIA/kvpress 0.5.5, presses/streaming_llm_press.py in DecodingPress");
  info.deviations.push_back(
      "sinks are positions; in DecodingPress they are slots, and after a compaction any tokens may sit "
      "there");
  info.deviations.push_back("positions=cache is KeyRerotationPress around it");
  return info;
}

std::unique_ptr<Policy> make_streaming_llm(PolicyInfo info) {
  return with_sinks(std::move(info));
}
std::unique_ptr<Policy> make_streaming_llm_zefan_cai(PolicyInfo info) {
  return with_sinks(std::move(info));
}
std::unique_ptr<Policy> make_streaming_llm_kvpress(PolicyInfo info) {
  return with_sinks(std::move(info));
}

}  // namespace kvlapse
