// Traces from what other tools dumped.
#include <filesystem>

#include "cli/command.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "core/base/error.h"
#include "trace/import/tensor_import.h"
#include "trace/trace_reader.h"

namespace kvlapse::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::vector<std::string> files;
  std::string format, output, kv_dtype, model;
  int n_prompt = 0;
  double rope_theta = 0;
  bool force = false;
};

constexpr const char* kLayout =
    "A file holds one sequence of T tokens; more files become one trace, a sequence each. Tensors:\n"
    "  q.L<layer>              [T, q_heads, head_dim]   after rotation (RoPE); fp32, fp16, bf16 (not in "
    "npz)\n"
    "  k.L<layer>, v.L<layer>  [T, kv_heads, head_dim]  k after rotation; the dtype of q\n"
    "  tokens                  [T]                      optional: ids, int32 or int64\n"
    "  mask.L<layer>           [kv_heads, T]            as export writes it: counted, its evictions are not "
    "kept\n"
    "Metadata (text in safetensors, 0-dimensional arrays in npz): n_prompt (tokens of the prompt; or "
    "--prompt),\n"
    "rope_theta, n_layers, kv_dtype, model, think_begin, think_end (positions). What is not given is stored "
    "as\n"
    "absent. From PyTorch, q of shape [1, heads, T, head_dim]: q[0].transpose(0, 1).contiguous()\n\n";

ImportFormat format_of(const std::string& name) {
  if (name == "safetensors") return ImportFormat::safetensors;
  if (name == "npz") return ImportFormat::npz;
  fail_usage(
      "--from: expected safetensors or npz, found '{}': save q, k and v with safetensors.torch.save_file "
      "or numpy.savez (see kvlapse import --help)",
      name);
}

void run_import(const Options& o, const CLI::App& command, Context& context) {
  const ImportFormat format = format_of(o.format);
  ImportFacts facts;
  if (command.count("--prompt") > 0) facts.n_prompt = o.n_prompt;
  if (command.count("--rope-theta") > 0) facts.rope_theta = o.rope_theta;
  if (!o.kv_dtype.empty()) facts.kv_dtype = parse_dtype(o.kv_dtype);
  facts.model = o.model;
  const std::vector<fs::path> files(o.files.begin(), o.files.end());
  ImportOptions options{.force = o.force};
  Progress progress("importing", 0, "tok", !context.quiet);
  options.progress = [&](int64_t done, int64_t) {
    progress.update(static_cast<double>(done));
    return !interrupted();
  };
  const ImportedTrace imported = import_tensors(files, format, facts, o.output, options);
  progress.finish();
  if (context.json)
    return print_json({{"trace", o.output},
                       {"sequences", imported.n_sequences},
                       {"tokens", imported.n_tokens},
                       {"tokens_known", imported.tokens_known},
                       {"layers", imported.geometry.n_layers},
                       {"recorded_layers", {imported.layer_begin, imported.layer_end}},
                       {"q_heads", imported.geometry.n_q_heads},
                       {"kv_heads", imported.geometry.n_kv_heads},
                       {"head_dim", imported.geometry.head_dim},
                       {"kv_dtype", dtype_name(imported.geometry.dtype)},
                       {"evictions_not_kept", imported.evicted},
                       {"interrupted", imported.interrupted},
                       {"content_hash", TraceReader(o.output).content_hash()},
                       {"trace_bytes", imported.file_bytes}});
  fmt::print("{}: {} sequence{}, {} tokens{}, layers {}:{}, {} q heads, {} kv heads of {}, {}, {}{}\n",
             o.output, imported.n_sequences, imported.n_sequences == 1 ? "" : "s", imported.n_tokens,
             imported.tokens_known ? "" : " (ids not known)", imported.layer_begin, imported.layer_end,
             imported.geometry.n_q_heads, imported.geometry.n_kv_heads, imported.geometry.head_dim,
             dtype_name(imported.geometry.dtype), format_bytes(static_cast<double>(imported.file_bytes)),
             imported.interrupted ? "; interrupted" : "");
  if (imported.evicted > 0)
    fmt::print("{}: {} evictions of the source are not kept: a replay attends over all tokens\n", o.output,
               imported.evicted);
}

}  // namespace

void add_import(CLI::App& app, Context& context) {
  CLI::App* command =
      add_command(app, context, "import", "a trace from q, k, v that another tool dumped",
                  std::string("  kvlapse import dump.safetensors --from safetensors -o dump.kvl\n"
                              "  kvlapse import a.npz b.npz --from npz --prompt 113 --kv-dtype "
                              "bf16 -o both.kvl\n\n") +
                      kLayout);
  auto o = std::make_shared<Options>();
  command->add_option("file", o->files, "one sequence each")->required();
  command->add_option("--from", o->format, "safetensors or npz (numpy.savez, not compressed)")->required();
  command->add_option("-o,--output", o->output, "the trace (*.kvl)")->required();
  command->add_option("--prompt", o->n_prompt, "tokens of the prompt, where the file does not say");
  command->add_option("--rope-theta", o->rope_theta, "base of the rotation, where the file does not say");
  command->add_option(
      "--kv-dtype", o->kv_dtype,
      "fp32, fp16 or bf16 that the values are stored in (default: the file's); they must fit exactly");
  command->add_option("--model", o->model, "its name, where the file does not say");
  command->add_flag("--force", o->force, "replace an existing file");
  command->callback([o, command, &context] { run_import(*o, *command, context); });
}

}  // namespace kvlapse::cli
