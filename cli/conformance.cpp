#include "core/engine/conformance.h"

#include "cli/command.h"
#include "cli/model_conformance.h"
#include "cli/model_path.h"
#include "cli/table.h"
#include "core/base/error.h"
#include "kernels/cpu/cpu_backend.h"

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
  if (report.rows.empty() && report.skipped.empty()) return;
  Table table({"group", "policy", "steps", "mismatches", "ties", "score error", "output error"});
  for (const ConformanceRow& row : report.rows)
    table.add({row.group, fmt::format("{}@{}", row.policy, row.reference), fmt::format("{}", row.steps),
               fmt::format("{}", row.kept_mismatches), fmt::format("{}", row.ties),
               error_text(row.max_score_error), error_text(row.max_output_error)});
  fmt::print("{}", table.text());
  for (const ConformanceSkip& skip : report.skipped)
    fmt::print("skipped {} of {}: {}\n", skip.group, skip.file, skip.why);
}

struct Request {
  std::vector<std::string> paths;
  std::string model;
  bool decoding = false;
};

void check(const Request& request, Context& context) {
  std::vector<std::unique_ptr<TensorFile>> files;
  std::vector<const TensorFile*> views;
  for (const std::string& path : request.paths) {
    files.push_back(open_safetensors(path));
    views.push_back(files.back().get());
  }
  ConformanceReport report;
  Json model_rows = Json::array();
  std::optional<Model> model;
  for (const TensorFile* file : views) {
    const bool of_model = is_model_golden(*file), of_tokenizer = is_tokenizer_golden(*file);
    if (of_model || of_tokenizer) {
      if (request.model.empty())
        fail_usage("--model: {} holds vectors of a model: expected the model's file or folder, found none",
                   file->describe());
      if (!model) model = load_model(find_model(request.model));
      ModelCheck result =
          of_model ? check_model(*file, *model, *make_cpu_backend()) : check_tokenizer(*file, *model);
      if (!result.passed) context.exit_code = 1;
      if (!context.json)
        fmt::print("{} {}: {}\n", result.passed ? "ok  " : "FAIL", file->describe(), result.verdict);
      model_rows.push_back(std::move(result.row));
    } else if (has_policy_vectors(*file)) {
      check_policy_vectors(*file, views, request.decoding, report);
    } else {
      fail(
          "{}: holds no vectors that are known here: expected tensors <group>.kept, longflow.slot, gen_ids "
          "or text_off",
          file->describe());
    }
  }
  if (context.json) {
    Json document = to_json(report);
    for (Json& row : model_rows) document["rows"].push_back(std::move(row));
    print_json(document);
  } else {
    print_report(report);
  }
  for (const ConformanceRow& row : report.rows)
    if (row.kept_mismatches > 0) context.exit_code = 1;
}

}  // namespace

void add_conformance(CLI::App& app, Context& context) {
  CLI::App* command = add_command(
      app, context, "conformance",
      "compares policies, or the model engine, with golden vectors of a reference",
      "  kvlapse conformance tests/data/gold_public_a.safetensors\n"
      "  kvlapse conformance tests/data/smollm2/*.safetensors --model models/smollm2/*.gguf --json");
  auto request = std::make_shared<Request>();
  command
      ->add_option("files", request->paths,
                   "golden vectors; a file without q, k, v finds them in another one")
      ->required();
  command->add_option("--model", request->model,
                      "model that vectors of the engine or of a tokenizer belong to");
  command->add_flag("--decoding", request->decoding,
                    "also the decoding_* groups: records of behaviour, not targets");
  command->callback([request, &context] { check(*request, context); });
}

}  // namespace kvlapse::cli
