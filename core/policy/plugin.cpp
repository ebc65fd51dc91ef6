#include "core/policy/plugin.h"

#include <dlfcn.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <string>

#include "core/base/error.h"
#include "core/policy/plugin_abi.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

static_assert(KVLAPSE_LOGITS == static_cast<int>(Signal::logits) &&
              KVLAPSE_VALUES == static_cast<int>(Signal::values));
constexpr uint32_t kKnownSignals = (KVLAPSE_VALUES << 1) - 1;
constexpr uint32_t kMostColumns = 16, kMostParameters = 32;

thread_local const char* t_running = nullptr;  // plug-in that this thread is in

constexpr int kCrashSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};

// Only async-signal-safe calls. A crash of our own keeps its default end.
void on_crash(int signal) {
  if (const char* name = t_running) {
    auto say = [](const char* text) {
      if (write(STDERR_FILENO, text, std::strlen(text)) < 0) _exit(2);
    };
    say("kvlapse: plug-in ");
    say(name);
    say(": crashed inside its own code (");
    say(sigdescr_np(signal));
    say(")\n");
    _exit(2);
  }
  std::signal(signal, SIG_DFL);
  raise(signal);
}

struct Running {
  explicit Running(const char* name) { t_running = name; }
  ~Running() { t_running = nullptr; }
};

struct Library {
  std::string path;  // owns what PolicyInfo::name views
  const kvlapse_plugin_info* plugin = nullptr;
};

void check(const std::string& path, const kvlapse_plugin_info& p) {
  const std::string_view name = p.name ? p.name : "";
  if (name.empty() ||
      name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") != std::string_view::npos)
    fail("plug-in {}: name: expected [a-z0-9_]+, found '{}'", path, name);
  if (!p.score) fail("plug-in {} ({}): score: expected a function, found null", path, name);
  if (p.state_columns > 0 && !p.observe)
    fail("plug-in {} ({}): observe: expected a function beside {} state columns, found null", path, name,
         p.state_columns);
  if (p.state_columns > kMostColumns || p.n_parameters > kMostParameters ||
      (p.n_parameters > 0 && !p.parameters))
    fail("plug-in {} ({}): expected at most {} state columns and {} parameters, found {} and {}", path, name,
         kMostColumns, kMostParameters, p.state_columns, p.n_parameters);
  if ((p.signals & ~kKnownSignals) != 0)
    fail("plug-in {} ({}): signals: expected bits of {:#x}, found {:#x}", path, name, kKnownSignals,
         p.signals);
  if (p.cadence < 1 || p.cadence > 65536)
    fail("plug-in {} ({}): cadence: expected a number in [1, 65536], found {}", path, name, p.cadence);
  for (uint32_t i = 0; i < p.n_parameters; ++i) {
    const kvlapse_parameter& parameter = p.parameters[i];
    if (!parameter.name || !(parameter.min <= parameter.value && parameter.value <= parameter.max))
      fail("plug-in {} ({}): parameter {}: expected a name and min <= value <= max", path, name, i);
  }
}

const Library& load(std::string_view written) {
  static std::mutex mutex;
  static std::map<std::string, Library, std::less<>> libraries;  // by path as written; never unloaded
  std::lock_guard lock(mutex);
  if (auto known = libraries.find(written); known != libraries.end()) return known->second;

  if (libraries.empty())
    for (int signal : kCrashSignals) std::signal(signal, on_crash);
  Library library{std::string(written), nullptr};
  if (!std::filesystem::exists(library.path))
    fail("plug-in {}: expected a shared library, found no file", library.path);
  void* handle = dlopen(library.path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) fail("plug-in {}: cannot be loaded: {}", library.path, dlerror());
  void* symbol = dlsym(handle, "kvlapse_plugin");
  if (!symbol) fail("plug-in {}: expected the symbol kvlapse_plugin, found none", library.path);
  library.plugin = reinterpret_cast<const kvlapse_plugin_info* (*)()>(symbol)();
  if (!library.plugin) fail("plug-in {}: kvlapse_plugin: expected a description, found null", library.path);
  if (library.plugin->abi != KVLAPSE_PLUGIN_ABI)
    fail("plug-in {}: interface version: expected {}, found {}", library.path, KVLAPSE_PLUGIN_ABI,
         library.plugin->abi);
  check(library.path, *library.plugin);
  return libraries.emplace(library.path, library).first->second;
}

class Plugin final : public Policy {
 public:
  Plugin(PolicyInfo info, const Library& library) : Policy(std::move(info)), library_(library) {
    for (const ParameterInfo& p : this->info().parameters) parameters_.push_back(p.value);
  }

  void observe(const LayerContext& at, LayerInputs& inputs, SlotState& state) const override {
    Buffers& buffers = scratch();
    for (int h = 0; h < at.geometry.n_kv_heads; ++h) {
      kvlapse_view view = view_of(at, inputs, h, buffers);
      view.newest = raw(at.table->newest(h));
      float* columns[kMostColumns];
      for (int c = 0; c < info().state_columns; ++c) columns[c] = state.column(c, h).data();
      call("observe", at, [&] { return library_.plugin->observe(&view, columns); });
    }
  }

  void score(const LayerContext& at, LayerInputs& inputs, const SlotState& state,
             Scores& out) const override {
    Buffers& buffers = scratch();
    for (int r = 0; r < out.n_rows(); ++r)
      reduce_heads(kv_heads_of(at, out, r), at.rule.gqa, out.row(r), [&](int h) {
        kvlapse_view view = view_of(at, inputs, h, buffers);
        const float* columns[kMostColumns];
        for (int c = 0; c < info().state_columns; ++c) columns[c] = state.column(c, h).data();
        buffers.scores.assign(view.n_slots, 0.0f);
        call("score", at, [&] { return library_.plugin->score(&view, columns, buffers.scores.data()); });
        return std::span<const float>(buffers.scores);
      });
  }

 private:
  struct Buffers {
    std::vector<float> logits, attention, output, scores;
  };
  static Buffers& scratch() {
    thread_local Buffers buffers;
    return buffers;
  }

  template <typename Call>
  void call(const char* function, const LayerContext& at, Call&& run) const {
    int rc = 0;
    {
      Running running(library_.plugin->name);
      try {
        rc = run();
      } catch (...) {
        fail("plug-in {} ({}): {} at step {}, layer {}: threw an exception", library_.path,
             library_.plugin->name, function, raw(at.step), at.layer);
      }
    }
    if (rc != 0)
      fail("plug-in {} ({}): {} at step {}, layer {}: expected 0, found {}", library_.path,
           library_.plugin->name, function, raw(at.step), at.layer, rc);
  }

  kvlapse_view view_of(const LayerContext& at, LayerInputs& inputs, int h, Buffers& buffers) const {
    const CacheGeometry& g = at.geometry;
    std::span<const Pos> positions = at.positions(h);
    kvlapse_view view{};
    view.layer = at.layer;
    view.kv_head = h;
    view.step = raw(at.step);
    view.n_prompt = at.n_prompt;
    view.budget = at.budget;
    view.n_slots = static_cast<int32_t>(positions.size());
    view.group = g.group();
    view.head_dim = g.head_dim;
    view.newest = -1;
    view.positions = reinterpret_cast<const int32_t*>(positions.data());
    view.parameters = parameters_.data();
    auto gather = [&](Signal signal, std::vector<float>& to, auto&& row) -> const float* {
      if (!contains(info().signals, signal)) return nullptr;
      to.clear();
      for (int q = h * g.group(); q < (h + 1) * g.group(); ++q) {
        std::span<const float> from = row(q);
        to.insert(to.end(), from.begin(), from.end());
      }
      return to.data();
    };
    view.logits = gather(Signal::logits, buffers.logits, [&](int q) { return inputs.logits(q); });
    view.attention = gather(Signal::attention, buffers.attention, [&](int q) { return inputs.attention(q); });
    view.output = gather(Signal::output, buffers.output, [&](int q) { return inputs.output(q); });
    if (contains(info().signals, Signal::value_l1)) view.value_l1 = inputs.value_l1(h).data();
    if (contains(info().signals, Signal::keys)) view.keys = inputs.keys(h).data();
    if (contains(info().signals, Signal::values)) view.values = inputs.values(h).data();
    return view;
  }

  const Library& library_;
  std::vector<double> parameters_;
};

}  // namespace

bool is_plugin_name(std::string_view name) {
  return name.find('/') != std::string_view::npos && name.ends_with(".so");
}

PolicyInfo plugin_info(std::string_view path) {
  const Library& library = load(path);
  const kvlapse_plugin_info& p = *library.plugin;
  PolicyInfo info;
  info.name = library.path;
  info.version = static_cast<int>(p.version);
  info.summary = p.summary ? p.summary : "";
  info.formula = "in the plug-in";
  info.paper = "";
  info.source = p.name;
  for (uint32_t i = 0; i < p.n_parameters; ++i) {
    const kvlapse_parameter& from = p.parameters[i];
    info.parameters.push_back(
        {from.name, from.value, from.min, from.max, from.summary ? from.summary : "", {}});
  }
  info.signals = p.signals;
  info.state_columns = static_cast<int>(p.state_columns);
  info.rule.cadence = static_cast<int>(p.cadence);
  if (p.cadence > 1) {
    info.rule.headroom = 0;
    info.rule.reclaim = Reclaim::compact;
  }
  return info;
}

std::unique_ptr<Policy> make_plugin(PolicyInfo info) {
  const Library& library = load(info.name);
  return std::make_unique<Plugin>(std::move(info), library);
}

}  // namespace kvlapse
