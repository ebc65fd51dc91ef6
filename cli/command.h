// The shape of a subcommand: one file cli/<name>.cpp with one function that declares its options and its
// callback, and one line in main.cpp. A callback throws Error (exit 2) or UsageError (exit 64), or sets
// exit_code to 1 when a check that was asked for failed.
#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>

namespace kvlapse::cli {

using Json = nlohmann::ordered_json;

struct Context {
  bool json = false;   // --json: one document on stdout, everything else on stderr
  bool quiet = false;  // -q: no progress, no remarks
  bool verbose = false;
  int exit_code = 0;
};

// A subcommand with the options that all have: --json (unless it prints no results), -q, -v. `examples` holds
// two worked examples, one a line, that --help prints at the end.
CLI::App* add_command(CLI::App& app, Context& context, const std::string& name, const std::string& summary,
                      const std::string& examples, bool has_json = true);

void print_json(const Json& document);

void add_bench(CLI::App& app, Context& context);
void add_calibrate(CLI::App& app, Context& context);
void add_choose(CLI::App& app, Context& context);
void add_conformance(CLI::App& app, Context& context);
void add_doctor(CLI::App& app, Context& context);
void add_eval(CLI::App& app, Context& context);
void add_export(CLI::App& app, Context& context);
void add_import(CLI::App& app, Context& context);
void add_info(CLI::App& app, Context& context);
void add_memory(CLI::App& app, Context& context);
void add_merge(CLI::App& app, Context& context);
void add_policies(CLI::App& app, Context& context);
void add_predict(CLI::App& app, Context& context);
void add_record(CLI::App& app, Context& context);
void add_replay(CLI::App& app, Context& context);
void add_sql(CLI::App& app, Context& context);
void add_verify(CLI::App& app, Context& context);
void add_view(CLI::App& app, Context& context);

}  // namespace kvlapse::cli
