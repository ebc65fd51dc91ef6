#include "core/engine/conformance.h"

#include "cli/command.h"
#include "cli/table.h"
#include "core/base/error.h"

namespace kvlapse::cli {
namespace {

Json to_json(const ConformanceReport& report) {
  Json rows = Json::array(), skipped = Json::array();
  for (const ConformanceRow& row : report.rows) {
    Json r{{"file", row.file},   {"policy", row.policy}, {"reference", row.reference},
           {"group", row.group}, {"steps", row.steps},   {"kept_mismatches", row.kept_mismatches},
           {"ties", row.ties}};
    if (row.max_score_error) r["max_score_error"] = *row.max_score_error;
    if (row.max_output_error) r["max_output_error"] = *row.max_output_error;
    rows.push_back(std::move(r));
  }
  for (const ConformanceSkip& skip : report.skipped)
    skipped.push_back({{"file", skip.file}, {"group", skip.group}, {"why", skip.why}});
  return {{"rows", rows}, {"skipped", skipped}};
}

std::string error_text(const std::optional<double>& error) {
  return error ? fmt::format("{:.2g}", *error) : "";
}

void print_report(const ConformanceReport& report) {
  Table table({"group", "policy", "steps", "mismatches", "ties", "score error", "output error"});
  for (const ConformanceRow& row : report.rows)
    table.add({row.group, fmt::format("{}@{}", row.policy, row.reference), fmt::format("{}", row.steps),
               fmt::format("{}", row.kept_mismatches), fmt::format("{}", row.ties),
               error_text(row.max_score_error), error_text(row.max_output_error)});
  fmt::print("{}", table.text());
  for (const ConformanceSkip& skip : report.skipped)
    fmt::print("skipped {} of {}: {}\n", skip.group, skip.file, skip.why);
}

}  // namespace

void add_conformance(CLI::App& app, Context& context) {
  CLI::App* command =
      add_command(app, context, "conformance",
                  "compares our policies with golden vectors of their reference implementations",
                  "  kvlapse conformance tests/data/gold_public_a.safetensors\n"
                  "  kvlapse conformance tests/data/kvpress_public_b.safetensors "
                  "tests/data/gold_public_b.safetensors --json");
  auto paths = std::make_shared<std::vector<std::string>>();
  auto decoding = std::make_shared<bool>(false);
  command->add_option("files", *paths, "golden vectors; a file without q, k, v finds them in another one")
      ->required();
  command->add_flag("--decoding", *decoding, "also the decoding_* groups: records of behaviour, not targets");
  command->callback([paths, decoding, &context] {
    std::vector<std::unique_ptr<TensorFile>> files;
    std::vector<const TensorFile*> views;
    for (const std::string& path : *paths) {
      files.push_back(open_safetensors(path));
      views.push_back(files.back().get());
    }
    ConformanceReport report;
    for (const TensorFile* file : views) {
      if (has_policy_vectors(*file))
        check_policy_vectors(*file, views, *decoding, report);
      else
        fail("{}: holds no vectors that are known here: expected tensors <group>.kept or longflow.slot",
             file->describe());
    }
    if (context.json)
      print_json(to_json(report));
    else
      print_report(report);
    for (const ConformanceRow& row : report.rows)
      if (row.kept_mismatches > 0) context.exit_code = 1;
  });
}

}  // namespace kvlapse::cli
