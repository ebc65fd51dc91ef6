#include "trace/export/perfetto.h"

#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <string>

#include "core/base/error.h"

namespace kvlapse {
namespace {

std::string escaped(std::string_view text) {
  std::string out;
  for (char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\')
      out += {'\\', c};
    else if (byte < 0x20)
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(byte));
    else
      out += c;
  }
  return out;
}

}  // namespace

void export_chrome_trace(const TraceReader& trace, const std::filesystem::path& file) {
  constexpr int kSteps = 1024;
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> out(std::fopen(file.c_str(), "wb"), &std::fclose);
  if (!out) fail("export: {}: cannot be written", file.string());
  fmt::print(out.get(),
             "{{\"displayTimeUnit\":\"ms\",\"otherData\":{{\"source\":\"{}\",\"content_hash\":\"{}\"}},\n",
             escaped(trace.file().filename().string()), trace.content_hash());
  fmt::print(out.get(), "\"traceEvents\":[");
  const char* separator = "\n";
  auto event = [&](const std::string& text) {
    fmt::print(out.get(), "{}{{{}}}", separator, text);
    separator = ",\n";
  };
  for (int s = 0; s < trace.n_sequences(); ++s) {
    const int pid = s + 1;
    event(fmt::format(R"("ph":"M","name":"process_name","pid":{},"args":{{"name":"sequence {}: {}"}})", pid,
                      s, escaped(trace.header().policy.spec)));
    event(fmt::format(R"("ph":"M","name":"thread_name","pid":{},"tid":1,"args":{{"name":"decode"}})", pid));
    for (int first = 0; first < trace.n_steps(s); first += kSteps)
      for (const TraceStep& step : trace.steps(s, first, first + kSteps)) {
        const StepSummary& at = step.summary;
        const double start_us = static_cast<double>(at.start_ns) / 1e3;
        std::string args = fmt::format(R"("token":{},"next_token":{})", at.token, at.next_token);
        for (int p = 0; p < kStepPhases; ++p)
          args += fmt::format(R"(,"{}_us":{:.3f})", step_phase_name(static_cast<StepPhase>(p)),
                              static_cast<double>(at.phase_ns[static_cast<size_t>(p)]) / 1e3);
        event(fmt::format(
            R"("ph":"X","cat":"step","name":"step {}","pid":{},"tid":1,"ts":{:.3f},"dur":{:.3f},"args":{{{}}})",
            raw(at.pos), pid, start_us, static_cast<double>(at.total_ns) / 1e3, args));
        for (const auto& [name, value] :
             {std::pair{"held tokens", step.held_tokens}, {"evicted tokens", step.evicted_tokens}})
          event(fmt::format(R"("ph":"C","name":"{}","pid":{},"ts":{:.3f},"args":{{"tokens":{}}})", name, pid,
                            start_us, value));
      }
  }
  fmt::print(out.get(), "\n]}}\n");
  if (std::fflush(out.get()) != 0) fail("export: {}: cannot be written: is the disk full?", file.string());
}

}  // namespace kvlapse
