// Document: the open files. Traces and results are shared with jobs; the list itself belongs to the UI
// thread. A follower thread watches traces that are still being written and results that change.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "gui/document/notes.h"
#include "gui/document/trace_source.h"

namespace kvlapse::gui {

class Document {
 public:
  explicit Document(std::function<void()> wake);
  ~Document();
  Document(const Document&) = delete;
  Document& operator=(const Document&) = delete;

  // A trace (*.kvl) or results (*.kvr), told apart by content. Throws Error.
  void open(const std::filesystem::path& file);
  void close_trace(size_t index);
  // The trace that the panels show; null: none is open.
  std::shared_ptr<TraceSource> trace() const { return traces_.empty() ? nullptr : traces_[primary_]; }
  const std::vector<std::shared_ptr<TraceSource>>& traces() const { return traces_; }
  size_t primary() const { return primary_; }
  void set_primary(size_t index);
  const std::vector<std::filesystem::path>& results() const { return results_; }
  // Changes with every opened, closed or grown file.
  uint64_t version() const;

  Notes& notes() { return notes_; }  // of the primary trace

 private:
  void follow();

  std::function<void()> wake_;
  std::vector<std::shared_ptr<TraceSource>> traces_;
  std::vector<std::filesystem::path> results_;
  size_t primary_ = 0;
  uint64_t opened_ = 0;
  Notes notes_;
  std::mutex mutex_;  // guards followed_
  std::vector<std::weak_ptr<TraceSource>> followed_;
  std::atomic<bool> stopping_{false};
  std::thread follower_;
};

}  // namespace kvlapse::gui
