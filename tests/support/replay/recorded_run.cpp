#include "tests/support/replay/recorded_run.h"

#include "core/engine/decode_session.h"
#include "kernels/cpu/cpu_backend.h"
#include "trace/recorder.h"

namespace kvlapse::test {

void record_run(const std::filesystem::path& file, const RecordedRun& run) {
  const Model model = load_model(run.model);
  const std::unique_ptr<Policy> policy = make_policy(run.policy);
  const std::unique_ptr<Backend> backend = make_cpu_backend(2);

  size_t n_prompt = 0;
  for (const auto& prompt : run.prompts) n_prompt = std::max(n_prompt, prompt.size());
  TraceHeader header;
  header.geometry = model.spec.cache_geometry(static_cast<int>(n_prompt) + run.max_tokens, run.kv_dtype);
  header.layer_end = header.geometry.n_layers;
  header.tier = TraceTier::qkv;
  header.budget_text = run.budget;
  if (policy->info().evicts)
    header.budget_slots = parse_budget(run.budget).slots(static_cast<int>(n_prompt) + run.max_tokens);
  const std::unique_ptr<Policy> claimed =
      make_policy(run.claimed_policy.empty() ? run.policy : run.claimed_policy);
  header.policy = describe_policy(*claimed, header.budget_slots, header.geometry.n_layers);
  header.rope_theta = model.spec.rope.theta;
  header.n_sequences = static_cast<int>(run.prompts.size());
  Recorder recorder(file, header, {.force = true});

  SessionOptions options;
  options.policy = policy.get();
  options.budget = parse_budget(run.budget);
  options.max_tokens = run.max_tokens;
  options.kv_dtype = run.kv_dtype;
  options.sampling.temperature = run.temperature;
  options.ignore_eos = true;
  options.observers = {&recorder};
  DecodeSession session(*backend, model, options);
  for (size_t s = 0; s < run.prompts.size(); ++s) {
    SequenceRequest request{.prompt = run.prompts[s], .seed = run.seed + s, .teacher = {}, .max_tokens = 0};
    if (!run.teachers.empty()) request.teacher = run.teachers[s];
    const int sequence = session.add_sequence(request);
    recorder.set_sequence(sequence, run.seed + s, session.sequence(sequence).budget_slots);
  }
  while (session.step()) {
  }
  recorder.finish(false);
}

}  // namespace kvlapse::test
