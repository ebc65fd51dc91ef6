#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>

#include "cli/command.h"
#include "cli/interrupt.h"
#include "cli/model_path.h"
#include "cli/products.h"
#include "cli/progress.h"
#include "core/base/error.h"
#include "core/engine/decode_session.h"
#include "core/model/prompt.h"
#include "core/task/task.h"
#include "kernels/choice/gpu.h"
#include "trace/gpu_capture.h"
#include "trace/recorder.h"
#include "trace/trace_reader.h"

namespace kvlapse::cli {
namespace {

constexpr int kDefaultMaxTokens = 4096;  // for a prompt of unknown length of answer

struct Options {
  std::string model, prompt, prompt_file, task, policy = "full", budget, device = "cpu", tier, layers;
  std::string decoder = "exact", kv_dtype, counters = "none", teacher, out;
  std::string products = kDefaultProducts;
  int max_tokens = 0, batch = 1, top_k = 0, threads = 0, counter_steps = 16;
  double temperature = 0, top_p = 1;
  uint64_t seed = 0;
  bool chat = false, ignore_eos = false, force = false;
};

// One sequence to be decoded, and what is known about it.
struct Request {
  SequenceRequest sequence;
  std::string prompt;
  std::optional<TaskProblem> problem;
};

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail("{}: cannot be read", path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

// "NAME[:SEED]"
std::pair<std::string, uint64_t> parse_task(const std::string& text) {
  if (text.empty()) return {std::string(longest_task_family()), 0};
  size_t colon = text.find(':');
  std::string name = text.substr(0, colon);
  if (!find_task_family(name)) {
    std::vector<std::string_view> known;
    for (const TaskFamily& family : task_families()) known.push_back(family.name);
    fail_usage("record: --task: unknown family '{}'{}", name, suggest(name, known));
  }
  if (colon == std::string::npos) return {name, 0};
  std::string digits = text.substr(colon + 1);
  if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos || digits.size() > 18)
    fail_usage("record: --task: expected NAME or NAME:SEED, found '{}'", text);
  return {name, std::stoull(digits)};
}

std::pair<int, int> parse_layers(const std::string& text, int n_layers) {
  if (text.empty()) return {0, n_layers};
  int begin = -1, end = -1, used = 0;
  if (std::sscanf(text.c_str(), "%d:%d%n", &begin, &end, &used) != 2 ||
      used != static_cast<int>(text.size()) || begin < 0 || end <= begin || end > n_layers)
    fail_usage("record: --layers: expected A:B with 0 <= A < B <= {}, found '{}'", n_layers, text);
  return {begin, end};
}

std::vector<Request> make_requests(const Options& options, const Model& model) {
  const int given = !options.prompt.empty() + !options.prompt_file.empty() + !options.task.empty() +
                    !options.teacher.empty();
  if (given > 1)
    fail_usage("record: give one of --prompt, --prompt-file, --task and --teacher, found {}", given);
  if (options.batch < 1) fail_usage("record: --batch: expected at least 1, found {}", options.batch);
  std::vector<Request> requests;
  if (!options.teacher.empty()) {
    TraceReader teacher(options.teacher);
    for (int s = 0; s < teacher.n_sequences(); ++s) {
      TraceSequence sequence = teacher.sequence(s);
      Request request;
      request.sequence.prompt.assign(sequence.tokens.begin(), sequence.tokens.begin() + sequence.n_prompt);
      request.sequence.teacher.assign(sequence.tokens.begin() + sequence.n_prompt, sequence.tokens.end());
      if (options.max_tokens > 0 && static_cast<int>(request.sequence.teacher.size()) > options.max_tokens)
        request.sequence.teacher.resize(options.max_tokens);
      request.sequence.max_tokens = static_cast<int>(request.sequence.teacher.size());
      request.sequence.seed = sequence.seed;
      request.prompt = sequence.prompt;
      if (!sequence.task.empty()) request.problem = make_task_problem(sequence.task, sequence.seed);
      requests.push_back(std::move(request));
    }
    return requests;
  }
  const bool is_task = options.prompt.empty() && options.prompt_file.empty();
  for (int i = 0; i < options.batch; ++i) {
    Request request;
    if (is_task) {
      auto [name, first_seed] = parse_task(options.task);
      request.sequence.seed = first_seed + options.seed + i;
      request.problem = make_task_problem(name, request.sequence.seed);
      request.prompt = request.problem->prompt;
      // Room for an answer a quarter longer than the right one.
      auto right = static_cast<int>(task_token_count(request.problem->completion));
      request.sequence.max_tokens = options.max_tokens > 0 ? options.max_tokens : right + right / 4 + 64;
    } else {
      request.sequence.seed = options.seed + i;
      request.prompt = options.prompt_file.empty() ? options.prompt : read_file(options.prompt_file);
      request.sequence.max_tokens = options.max_tokens;
    }
    Prompt prompt = make_prompt(model.spec, *model.tokenizer, request.prompt, options.chat);
    request.prompt = std::move(prompt.text);
    request.sequence.prompt = std::move(prompt.ids);
    if (request.sequence.max_tokens == 0)
      request.sequence.max_tokens = std::clamp(
          model.spec.context - static_cast<int>(request.sequence.prompt.size()), 1, kDefaultMaxTokens);
    requests.push_back(std::move(request));
  }
  return requests;
}

// Position of the first occurrence of a one-token tag, -1 when the model has no such token or it did not
// occur.
int tag_position(const Tokenizer& tokenizer, std::string_view tag, std::span<const int32_t> tokens) {
  std::vector<int32_t> ids;
  try {
    ids = tokenizer.encode(tag, SpecialTokens::parse);
  } catch (const Error&) {
    return -1;  // a vocabulary without these characters has no such tag
  }
  if (ids.size() != 1) return -1;
  auto found = std::find(tokens.begin(), tokens.end(), ids[0]);
  return found == tokens.end() ? -1 : static_cast<int>(found - tokens.begin());
}

bool is_fused(const Options& options) {
  if (options.decoder != "exact" && options.decoder != "fused")
    fail_usage("record: --decoder: expected exact or fused, found '{}'", options.decoder);
  return options.decoder == "fused";
}

class Recording {
 public:
  Recording(const Options& options, Context& context)
      : options_(options),
        context_(context),
        model_(load_model(find_model(options.model))),
        products_(options.device == "cpu" ? products_of(options.products, model_) : MatmulMode::exact),
        fused_(is_fused(options)),
        policy_(make_policy(options.policy)),
        counters_(parse_counters(options.counters)),
        requests_(make_requests(options, model_)) {
    if (counters_ != GpuCounters::none && !options.device.starts_with("cuda"))
      fail("record: --counters {}: GPU counters need --device cuda; expected none", options.counters);
    if (policy_->info().evicts && options.budget.empty())
      fail_usage("record: --policy {}: expected a --budget, as slots per kv head (512) or a share (25%)",
                 options.policy);
    session_options_.policy = policy_.get();
    session_options_.budget = parse_budget(options.budget.empty() ? "100%" : options.budget);
    session_options_.max_tokens = 0;
    for (const Request& request : requests_)
      session_options_.max_tokens = std::max(session_options_.max_tokens, request.sequence.max_tokens);
    session_options_.kv_dtype = fused_ ? DType::bf16 : DType::f32;
    if (!options.kv_dtype.empty()) session_options_.kv_dtype = parse_dtype(options.kv_dtype);
    tier_ = fused_ ? TraceTier::events : TraceTier::qkv;
    if (!options.tier.empty()) tier_ = parse_tier(options.tier);
    if (session_options_.kv_dtype == DType::f8e4m3)
      fail("record: --kv-dtype fp8: no engine keeps an fp8 cache; expected fp32, fp16 or bf16");
    session_options_.sampling = {options.temperature, options.top_k, options.top_p};
    session_options_.ignore_eos = options.ignore_eos;
    session_options_.interrupt = &interrupted();
    backend_ = fused_ ? make_fused() : make_backend(options.device, options.threads, products_);
  }

  void run() {
    // Everything that can be refused is refused before a file is made.
    int64_t total_tokens = 0, longest = 0;
    for (const Request& request : requests_) {
      const RequestPlan plan = plan_request(model_.spec, session_options_, request.sequence);
      total_tokens += plan.max_tokens;
      longest = std::max<int64_t>(longest, plan.total_tokens);
    }
    TraceHeader header = make_header(static_cast<int>(longest));
    if (!context_.quiet)
      fmt::print(stderr, "recording {} with {}, {} tier, at most {} tokens: expect up to {}\n", options_.out,
                 header.policy.spec + (policy_->info().evicts ? " at " + header.budget_text : ""),
                 tier_name(tier_), longest,
                 format_bytes(static_cast<double>(estimate_trace_bytes(header, longest) *
                                                  static_cast<int64_t>(requests_.size()))));
    TraceWriterOptions writer_options{.force = options_.force};
    writer_options.token_text = [this](int32_t id) { return std::string(model_.tokenizer->token_bytes(id)); };
    Recorder recorder(options_.out, header, writer_options);
    session_options_.observers = {&recorder};
    DecodeSession session(*backend_, model_, session_options_);
    for (size_t i = 0; i < requests_.size(); ++i) {
      const int s = session.add_sequence(requests_[i].sequence);
      recorder.set_sequence(s, requests_[i].sequence.seed, session.sequence(s).budget_slots);
    }
    start_capture(session);
    decode(session, recorder, static_cast<double>(total_tokens));
    if (capture_) recorder.add_gpu(capture_->finish());
    for (size_t i = 0; i < requests_.size(); ++i) describe(session, recorder, static_cast<int>(i));
    recorder.finish(interrupted());
    report(session, recorder);
  }

 private:
  // A device that runs ahead keeps its steps to itself, but for what they chose.
  std::unique_ptr<Backend> make_fused() const {
    const auto refuse = [](std::string_view option, std::string_view expected, std::string_view found) {
      fail_usage("record: --decoder fused: {}: expected {}, found {}", option, expected, found);
    };
    if (!options_.device.starts_with("cuda")) refuse("--device", "cuda or cuda:N", options_.device);
    if (policy_->info().evicts && fused_score(policy_->info()) == FusedScore::none)
      refuse("--policy", "full, longflow, tova or caote, evicting at every step", options_.policy);
    if (tier_ != TraceTier::events)
      refuse("--tier", "events (q, k, v and attention stay on the device)", options_.tier);
    if (session_options_.kv_dtype != DType::bf16) refuse("--kv-dtype", "bf16", options_.kv_dtype);
    if (options_.temperature > 0) refuse("--temperature", "0", fmt::format("{:g}", options_.temperature));
    if (!options_.teacher.empty()) refuse("--teacher", "none", options_.teacher);
    if (options_.counters != "none") refuse("--counters", "none", options_.counters);
    CudaFusedDecode decode;
    decode.device = parse_device(options_.device);
    decode.batch = static_cast<int>(requests_.size());
    int prompt = 0, generated = 0;
    for (const Request& request : requests_) {
      const RequestPlan plan = plan_request(model_.spec, session_options_, request.sequence);
      prompt = std::max(prompt, static_cast<int>(request.sequence.prompt.size()));
      generated = std::max(generated, plan.max_tokens);
      if (&request != &requests_.front() && plan.budget_slots != decode.budget)
        refuse("--budget", "a number of slots, one for all sequences", options_.budget);
      decode.budget = plan.budget_slots;
    }
    decode.n_tokens = prompt + generated;
    return make_fused_backend(decode, model_.weights.transformer, *policy_);
  }

  TraceHeader make_header(int longest) const {
    const ModelSpec& spec = model_.spec;
    TraceHeader header;
    header.geometry = spec.cache_geometry(longest, session_options_.kv_dtype);
    std::tie(header.layer_begin, header.layer_end) = parse_layers(options_.layers, spec.n_layers);
    header.tier = tier_;
    const bool evicts = policy_->info().evicts;
    header.budget_slots =
        plan_request(model_.spec, session_options_, requests_.front().sequence).budget_slots;
    header.budget_text = evicts ? session_options_.budget.text() : "";
    header.policy = describe_policy(*policy_, header.budget_slots, spec.n_layers);
    header.rope_theta = spec.rope.theta;
    header.n_sequences = static_cast<int>(requests_.size());
    header.meta = {{"model", spec.name},
                   {"model_hash", model_content_hash(model_.path)},
                   {"device", backend_->describe()},
                   {"decoder", options_.decoder},
                   {"program", std::string("kvlapse ") + KVLAPSE_VERSION},
                   {"temperature", fmt::format("{:g}", options_.temperature)},
                   {"top_k", fmt::format("{}", options_.top_k)},
                   {"top_p", fmt::format("{:g}", options_.top_p)},
                   {"ignore_eos", options_.ignore_eos ? "1" : "0"},
                   {"teacher", options_.teacher.empty() ? "0" : "1"},
                   {"max_tokens", fmt::format("{}", session_options_.max_tokens)},
                   {"products", products_name(products_)},
                   {"counters", options_.counters}};
    return header;
  }

  void start_capture(const DecodeSession& session) {
    if (counters_ == GpuCounters::none) return;
    GpuCaptureOptions capture;
    capture.counters = counters_;
    capture.counter_steps = options_.counter_steps;
    if (const size_t colon = options_.device.find(':'); colon != std::string::npos)
      capture.device = std::atoi(options_.device.c_str() + colon + 1);
    capture.session_ns = [&session] { return session.now_ns(); };
    capture_ = make_gpu_capture(capture);
    for (const GpuSource& source : capture_->sources())
      if (!source.reason.empty() && !context_.quiet)
        fmt::print(stderr, "recording without {}: {}; {}\n", source.name, source.reason, source.advice);
  }

  bool step(DecodeSession& session, Recorder& recorder) {
    if (!capture_) return session.step();
    backend_->launch_singly(capture_->begin_step(n_captured_++));
    const bool more = session.step();
    capture_->end_step(backend_->take_launches());
    recorder.add_gpu(capture_->take());
    return more;
  }

  void decode(DecodeSession& session, Recorder& recorder, double total_tokens) {
    const bool stream = !context_.quiet && !context_.json && requests_.size() == 1;
    // On a terminal the text itself shows the progress.
    Progress progress("recording", total_tokens, "tok",
                      !context_.quiet && !(stream && isatty(STDOUT_FILENO)));
    StreamDecoder decoder(*model_.tokenizer);
    size_t shown = 0;
    start_ = std::chrono::steady_clock::now();
    for (bool more = true; more;) {
      more = step(session, recorder);
      int64_t generated = 0;
      for (int s = 0; s < session.n_sequences(); ++s) generated += session.sequence(s).generated();
      generated_ = generated;
      if (stream) {
        const SequenceState& state = session.sequence(0);
        for (shown = std::max(shown, static_cast<size_t>(state.n_prompt)); shown < state.tokens.size();
             ++shown)
          fmt::print("{}", decoder.push(state.tokens[shown]));
        std::fflush(stdout);
      }
      progress.update(static_cast<double>(generated),
                      fmt::format("{} written",
                                  format_bytes(static_cast<double>(recorder.writer().stats().stored_bytes))));
    }
    seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    if (stream) fmt::print("{}\n", decoder.finish());
  }

  void describe(const DecodeSession& session, Recorder& recorder, int s) {
    const SequenceState& state = session.sequence(s);
    TraceSequence facts;
    facts.sequence = s;
    facts.prompt = requests_[s].prompt;
    std::span<const int32_t> generated = std::span(state.tokens).subspan(state.n_prompt);
    facts.text = model_.tokenizer->decode(generated);
    facts.answer = extract_answer(facts.text);
    int begin = tag_position(*model_.tokenizer, kThinkTag, generated),
        end = tag_position(*model_.tokenizer, kEndThinkTag, generated);
    facts.think_begin = begin < 0 ? -1 : begin + state.n_prompt;
    facts.think_end = end < 0 ? -1 : end + state.n_prompt;
    if (requests_[s].problem) {
      facts.task = requests_[s].problem->family;
      facts.answer_right = answer_is_right(*requests_[s].problem, facts.text);
    }
    recorder.describe_sequence(facts);
    texts_.push_back(std::move(facts));
  }

  void report(const DecodeSession& session, const Recorder& recorder) {
    int64_t evictions = 0;
    for (int s = 0; s < session.n_sequences(); ++s) evictions += session.sequence(s).evictions;
    const double rate = seconds_ > 0 ? static_cast<double>(generated_) / seconds_ : 0;
    const SequenceState& first = session.sequence(0);
    if (context_.json) {
      Json document = {{"trace", options_.out},
                       {"prompt_tokens", first.n_prompt},
                       {"generated_tokens", generated_},
                       {"text", texts_[0].text},
                       {"answer", texts_[0].answer},
                       {"tokens_per_s", rate},
                       {"evictions", evictions},
                       {"trace_bytes", recorder.writer().file_bytes()},
                       {"overhead_ratio", recorder.overhead_ratio()},
                       {"end_reason", first.end_reason},
                       {"policy", canonical_spec(*policy_)},
                       {"budget_slots", first.budget_slots}};
      if (texts_[0].answer_right) document["answer_right"] = *texts_[0].answer_right;
      if (session.n_sequences() > 1) {
        Json sequences = Json::array();
        for (int s = 0; s < session.n_sequences(); ++s)
          sequences.push_back({{"seed", requests_[s].sequence.seed},
                               {"prompt_tokens", session.sequence(s).n_prompt},
                               {"generated_tokens", session.sequence(s).generated()},
                               {"text", texts_[s].text},
                               {"answer", texts_[s].answer},
                               {"end_reason", session.sequence(s).end_reason}});
        document["sequences"] = std::move(sequences);
      }
      print_json(document);
    } else {
      std::string answer =
          texts_[0].answer.empty() ? std::string("no answer") : fmt::format("answer {}", texts_[0].answer);
      if (texts_[0].answer_right) answer += *texts_[0].answer_right ? " (right)" : " (wrong)";
      if (!options_.teacher.empty()) answer = "teacher's tokens";
      fmt::print(
          "{}: {} prompt + {} generated tokens, ended by {}, {}; {:.0f} tok/s, {} evictions, {}, recording "
          "cost {:.1f} %\n",
          options_.out, first.n_prompt, generated_, first.end_reason, answer, rate, evictions,
          format_bytes(static_cast<double>(recorder.writer().file_bytes())), 100 * recorder.overhead_ratio());
    }
    if (interrupted() && !context_.quiet)
      fmt::print(stderr, "interrupted: {} is valid up to its last step\n", options_.out);
  }

  const Options& options_;
  Context& context_;
  Model model_;
  MatmulMode products_;
  bool fused_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Policy> policy_;
  GpuCounters counters_;
  std::unique_ptr<GpuCapture> capture_;  // with --counters
  std::vector<Request> requests_;
  SessionOptions session_options_;
  TraceTier tier_ = TraceTier::qkv;
  std::vector<TraceSequence> texts_;
  std::chrono::steady_clock::time_point start_;
  double seconds_ = 0;
  int64_t generated_ = 0;
  int64_t n_captured_ = 0;  // steps
};

}  // namespace

void add_record(CLI::App& app, Context& context) {
  CLI::App* command = add_command(
      app, context, "record", "decode with a model and record everything into one trace",
      "  kvlapse record -o full.kvl\n"
      "  kvlapse record --task sort:7 --policy longflow --budget 25% -o evicted.kvl\n"
      "  kvlapse record --device cuda --decoder fused --policy longflow --budget 512 -o fast.kvl");
  auto o = std::make_shared<Options>();
  command->add_option("-o,--out", o->out, "trace to write (*.kvl)")->required();
  command->add_option("--model", o->model, "model folder, file or name (default: the built-in one)");
  command->add_option("--prompt", o->prompt, "prompt text");
  command->add_option("--prompt-file", o->prompt_file, "file with the prompt");
  command->add_option("--task", o->task,
                      "task of the built-in model, NAME[:SEED] (default: the longest family, seed 0)");
  command->add_option("--teacher", o->teacher, "feed the tokens of this trace while eviction is real");
  command->add_flag("--chat", o->chat, "apply the model's chat template to the prompt");
  command->add_option("--policy", o->policy, "eviction policy (see kvlapse policies)")->capture_default_str();
  command->add_option("--budget", o->budget,
                      "slots per kv head (512), or a share of prompt + max tokens (25%)");
  command->add_option(
      "--max-tokens", o->max_tokens,
      "tokens to generate at most (default: a quarter more than a task's right text, else 4096)");
  command->add_option("--batch", o->batch, "sequences, seeds S..S+N-1, in one trace")->capture_default_str();
  command->add_option("--device", o->device, "cpu or cuda[:i]")->capture_default_str();
  command
      ->add_option(
          "--decoder", o->decoder,
          "exact: the CPU's numbers on every device; fused: --device cuda's fast steps, which choose "
          "victims themselves and are recorded while later ones run")
      ->capture_default_str();
  command->add_option("--tier", o->tier,
                      "what is recorded: events, sketch or qkv (default: qkv; events with --decoder fused, "
                      "which has no other)");
  command->add_option("--layers", o->layers,
                      "layers whose q, k, v or sketches are recorded, A:B (default: all)");
  command->add_option("--kv-dtype", o->kv_dtype,
                      "dtype of the K/V cache: fp32, fp16, bf16 or fp8 (default: fp32; bf16 with --decoder "
                      "fused, which has no other)");
  add_products_option(*command, o->products);
  command->add_option("--counters", o->counters, "GPU counters: none, activity, dram or kernels")
      ->capture_default_str();
  command
      ->add_option("--counter-steps", o->counter_steps,
                   "steps whose kernels are counted, of --counters kernels")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_flag("--ignore-eos", o->ignore_eos, "go on after the end token, to --max-tokens");
  command->add_option("--temperature", o->temperature, "0: greedy")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--top-p", o->top_p, "nucleus")->capture_default_str()->check(CLI::Range(0.0, 1.0));
  command->add_option("--top-k", o->top_k, "0: all")->capture_default_str()->check(CLI::NonNegativeNumber);
  command->add_option("--seed", o->seed, "of sampling, or added to the task's")->capture_default_str();
  command->add_option("-j,--threads", o->threads, "threads (default: all)");
  command->add_flag("--force", o->force, "replace an existing trace");
  command->callback([o, &context] { Recording(*o, context).run(); });
}

}  // namespace kvlapse::cli
