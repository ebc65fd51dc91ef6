#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <cstdio>
#include <iostream>

#include "cli/command.h"
#include "cli/interrupt.h"
#include "core/base/error.h"
#include "core/policy/spec.h"

namespace kvlapse::cli {
namespace {

constexpr int kExitFailed = 2, kExitUsage = 64;

void add_commands(CLI::App& app, Context& context) {
  add_bench(app, context);
  add_calibrate(app, context);
  add_choose(app, context);
  add_conformance(app, context);
  add_doctor(app, context);
  add_eval(app, context);
  add_export(app, context);
  add_import(app, context);
  add_info(app, context);
  add_memory(app, context);
  add_merge(app, context);
  add_policies(app, context);
  add_predict(app, context);
  add_record(app, context);
  add_replay(app, context);
  add_sql(app, context);
  add_verify(app, context);
  add_view(app, context);
}

// CLI11 would only say that a subcommand is required.
void require_known_command(const CLI::App& app, int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return;
  std::vector<std::string_view> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    if (command->get_name() == argv[1]) return;
    names.push_back(command->get_name());
  }
  fail_usage("unknown command '{}'{}; see kvlapse --help", argv[1], suggest(argv[1], names));
}

void set_up_log(const Context& context) {
  auto log = spdlog::stderr_color_mt("kvlapse");
  log->set_pattern("%^%l%$: %v");
  log->set_level(context.verbose ? spdlog::level::debug
                 : context.quiet ? spdlog::level::err
                                 : spdlog::level::info);
  spdlog::set_default_logger(log);
}

int run(int argc, char** argv) {
  CLI::App app{"kvlapse: a time-lapse camera for the KV cache of reasoning models"};
  app.set_version_flag("--version", std::string("kvlapse ") + KVLAPSE_VERSION);
  app.require_subcommand(1);
  app.footer(
      "Start with: kvlapse record -o run.kvl && kvlapse replay run.kvl --policy longflow,rkv --budget 25% -o "
      "run.kvr");
  Context context;
  add_commands(app, context);
  // Options are parsed before any callback runs, so the log knows -q and -v.
  app.parse_complete_callback([&] { set_up_log(context); });
  install_interrupt_handler();
  try {
    require_known_command(app, argc, argv);
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {  // --help, --version
    return app.exit(request);
  } catch (const CLI::ParseError& error) {
    fmt::print(stderr, "kvlapse: {} (see kvlapse --help)\n", error.what());
    return kExitUsage;
  } catch (const UsageError& error) {
    fmt::print(stderr, "kvlapse: {}\n", error.what());
    return kExitUsage;
  } catch (const std::exception& error) {
    fmt::print(stderr, "kvlapse: {}\n", error.what());
    return kExitFailed;
  }
  return context.exit_code;
}

}  // namespace

CLI::App* add_command(CLI::App& app, Context& context, const std::string& name, const std::string& summary,
                      const std::string& examples, bool has_json) {
  CLI::App* command = app.add_subcommand(name, summary);
  if (has_json) command->add_flag("--json", context.json, "print one JSON document on stdout");
  command->add_flag("-q,--quiet", context.quiet, "no progress, no remarks");
  command->add_flag("-v,--verbose", context.verbose, "say what is done");
  command->footer("Examples:\n" + examples);
  return command;
}

void print_json(const Json& document) {
  std::cout << document.dump(2) << std::endl;
}

}  // namespace kvlapse::cli

int main(int argc, char** argv) {
  return kvlapse::cli::run(argc, argv);
}
