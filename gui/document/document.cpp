#include "gui/document/document.h"

#include <algorithm>
#include <chrono>

#include "core/base/error.h"

namespace kvlapse::gui {
namespace {

constexpr std::chrono::milliseconds kFollowInterval{200};

bool is_results(const std::filesystem::path& file) {
  return file.extension() == ".kvr";
}

}  // namespace

Document::Document(std::function<void()> wake) : wake_(std::move(wake)), follower_([this] { follow(); }) {}

Document::~Document() {
  stopping_ = true;
  follower_.join();
}

void Document::open(const std::filesystem::path& file) {
  if (!std::filesystem::exists(file)) fail("{}: no such file", file.string());
  if (is_results(file)) {
    if (std::ranges::find(results_, file) == results_.end()) results_.push_back(file);
    ++opened_;
    return;
  }
  const auto same = std::ranges::find_if(traces_, [&](const auto& trace) { return trace->file() == file; });
  if (same != traces_.end()) {
    set_primary(static_cast<size_t>(same - traces_.begin()));
    return;
  }
  auto trace = std::make_shared<TraceSource>(file);
  traces_.push_back(trace);
  {
    const std::scoped_lock lock(mutex_);
    followed_.push_back(trace);
  }
  if (traces_.size() == 1) set_primary(0);
  ++opened_;
}

void Document::close_trace(size_t index) {
  traces_.erase(traces_.begin() + static_cast<std::ptrdiff_t>(index));
  primary_ = 0;
  if (!traces_.empty()) set_primary(0);
  ++opened_;
}

void Document::set_primary(size_t index) {
  primary_ = index;
  notes_.load(traces_[index]->file());
  ++opened_;
}

uint64_t Document::version() const {
  uint64_t version = opened_ << 32;
  for (const auto& trace : traces_) version += trace->version();
  return version;
}

void Document::follow() {
  while (!stopping_) {
    std::this_thread::sleep_for(kFollowInterval);
    std::vector<std::shared_ptr<TraceSource>> live;
    {
      const std::scoped_lock lock(mutex_);
      std::erase_if(followed_, [](const auto& trace) { return trace.expired(); });
      for (const auto& trace : followed_) {
        if (auto open = trace.lock(); open && open->live()) live.push_back(open);
      }
    }
    bool changed = false;
    for (const auto& trace : live) {
      try {
        changed |= trace->follow();
      } catch (const Error&) {
        // The writer may be between two states (recovery after a kill); the next round tells.
      }
    }
    if (changed) wake_();
  }
}

}  // namespace kvlapse::gui
