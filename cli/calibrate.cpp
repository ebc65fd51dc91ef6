#include <fmt/format.h>

#include <filesystem>
#include <fstream>

#include "cli/command.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "core/base/error.h"
#include "replay/fit_centres.h"

namespace kvlapse::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::vector<std::string> traces;
  std::string output;
  bool force = false;
};

void run(const Options& o, Context& context) {
  std::error_code error;
  if (!o.force && fs::exists(o.output, error)) fail("{}: exists; --force replaces it", o.output);
  Progress progress("calibrate", 1, "recordings", !context.quiet);
  const QueryCentres centres = fit_centres({o.traces.begin(), o.traces.end()}, [&](double share) {
    progress.update(share);
    return !interrupted();
  });
  progress.finish();
  const fs::path part = o.output + ".part";
  {
    std::ofstream out(part, std::ios::binary);
    out << centres.to_bytes();
    if (!out.flush()) fail("{}: cannot be written", part.string());
  }
  fs::rename(part, o.output, error);
  if (error) fail("{}: cannot be written: {}", o.output, error.message());
  if (context.json)
    return print_json({{"calibration", o.output},
                       {"id", query_centres_id(o.output)},
                       {"layers", centres.n_layers},
                       {"q_heads", centres.n_q_heads},
                       {"head_dim", centres.head_dim},
                       {"rope_theta", centres.rope_theta},
                       {"queries", centres.n_queries},
                       {"traces", centres.traces}});
  fmt::print("{}: mean queries of {} x {} heads over {} tokens of {} recording{}\n", o.output,
             centres.n_layers, centres.n_q_heads, centres.n_queries, o.traces.size(),
             o.traces.size() == 1 ? "" : "s");
}

}  // namespace

void add_calibrate(CLI::App& app, Context& context) {
  auto options = std::make_shared<Options>();
  CLI::App* command = add_command(app, context, "calibrate",
                                  "fits what TriAttention knows of a model's queries, on other recordings",
                                  "  kvlapse calibrate monday.kvl -o queries.safetensors\n"
                                  "  kvlapse replay run.kvl --policy "
                                  "triattention:calibration=queries.safetensors --budget 25% -o run.kvr");
  command->add_option("traces", options->traces, "recordings of one model with q, k, v (*.kvl)")
      ->required()
      ->type_name("TRACE");
  command->add_option("-o,--output", options->output, "file of query centres (*.safetensors)")->required();
  command->add_flag("--force", options->force, "replace an existing file");
  command->callback([options, &context] { run(*options, context); });
}

}  // namespace kvlapse::cli
