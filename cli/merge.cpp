#include <fmt/format.h>

#include <filesystem>

#include "cli/command.h"
#include "replay/results_file.h"

namespace kvlapse::cli {

void add_merge(CLI::App& app, Context& context) {
  struct Options {
    std::vector<std::string> inputs;
    std::string output;
    bool force = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command =
      add_command(app, context, "merge", "joins results files; the same bytes for any sharding",
                  "  kvlapse merge part-*.kvr -o all.kvr\n"
                  "  kvlapse merge monday.kvr tuesday.kvr -o week.kvr --force");
  command->add_option("inputs", options->inputs, "finished results files (*.kvr)")
      ->required()
      ->type_name("FILE");
  command->add_option("-o,--output", options->output, "results file (*.kvr)")->required();
  command->add_flag("--force", options->force, "replace an existing file");
  command->callback([options, &context] {
    const std::vector<std::filesystem::path> inputs(options->inputs.begin(), options->inputs.end());
    merge_results(inputs, options->output, options->force);
    const Results merged = read_results(options->output);
    if (context.json)
      print_json({{"results", options->output},
                  {"inputs", inputs.size()},
                  {"cells", merged.cells.size()},
                  {"evals", merged.evals.size()}});
    else
      fmt::print("{}: {} cells, {} evaluations from {} files\n", options->output, merged.cells.size(),
                 merged.evals.size(), inputs.size());
  });
}

}  // namespace kvlapse::cli
