#include "trace/verify.h"

#include <fmt/format.h>

#include "cli/command.h"
#include "cli/progress.h"

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
