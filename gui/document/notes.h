// Notes: bookmarks and remarks about steps of one trace, kept in FILE.notes beside it, one "step<TAB>text" a
// line, so that they travel with the file and a version control system can merge them. UI thread only.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace kvlapse::gui {

struct Note {
  int step = 0;
  std::string text;
};

class Notes {
 public:
  // Reads FILE.notes; none is no error. Unreadable lines are kept as they are.
  void load(const std::filesystem::path& trace);
  void set(int step, const std::string& text);
  void remove(int step);
  const Note* at(int step) const;
  const std::vector<Note>& all() const { return notes_; }  // by step
  const std::filesystem::path& file() const { return file_; }
  // "" or why the last change could not be saved.
  const std::string& problem() const { return problem_; }

 private:
  void save();
  std::filesystem::path file_;
  std::vector<Note> notes_;
  std::vector<std::string> foreign_;
  std::string problem_;
};

}  // namespace kvlapse::gui
