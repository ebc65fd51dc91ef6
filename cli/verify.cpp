#include "trace/verify.h"

#include <fmt/format.h>

#include "cli/command.h"
#include "cli/progress.h"
#include "replay/results_file.h"

namespace kvlapse::cli {

void add_verify(CLI::App& app, Context& context) {
  CLI::App* command = add_command(app, context, "verify",
                                  "check every invariant and checksum; exit 1 names the first violation",
                                  "  kvlapse verify run.kvl\n  kvlapse verify *.kvl --json");
  auto files = std::make_shared<std::vector<std::string>>();
  command->add_option("files", *files, "traces or results")->required();
  command->callback([files, &context] {
    Json rows = Json::array();
    for (const std::string& file : *files) {
      if (is_results_file(file)) {
        const ResultsReport report = verify_results(file);
        if (!report.violations.empty()) context.exit_code = 1;
        rows.push_back({{"file", file},
                        {"ok", report.violations.empty()},
                        {"complete", report.complete},
                        {"cells", report.cells},
                        {"evals", report.evals},
                        {"violations", report.violations}});
        if (context.json) continue;
        if (report.violations.empty())
          fmt::print("{}: sound: {} cells, {} evaluations{}\n", file, report.cells, report.evals,
                     report.complete ? "" : "; not complete (interrupted or still written)");
        for (const std::string& violation : report.violations) fmt::print("{}: {}\n", file, violation);
        continue;
      }
      Progress progress(fmt::format("verify {}", file), 0, "chunks", !context.quiet);
      VerifyReport report =
          verify_trace(file, 20, [&](int64_t done, int64_t) { progress.update(static_cast<double>(done)); });
      progress.finish();
      if (!report.ok()) context.exit_code = 1;
      rows.push_back({{"file", file},
                      {"ok", report.ok()},
                      {"complete", report.complete},
                      {"steps", report.steps},
                      {"chunks", report.chunks},
                      {"evictions", report.evictions},
                      {"violations", report.violations}});
      if (context.json) continue;
      if (report.ok())
        fmt::print("{}: sound: {} steps, {} chunks, {} evictions{}\n", file, report.steps, report.chunks,
                   report.evictions, report.complete ? "" : "; not complete (interrupted or still written)");
      for (const std::string& violation : report.violations) fmt::print("{}: {}\n", file, violation);
    }
    if (context.json) print_json({{"rows", rows}});
  });
}

}  // namespace kvlapse::cli
