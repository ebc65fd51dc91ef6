#include "gui/document/notes.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <system_error>

namespace kvlapse::gui {

void Notes::load(const std::filesystem::path& trace) {
  file_ = trace;
  file_ += ".notes";
  notes_.clear();
  foreign_.clear();
  problem_.clear();
  std::ifstream in(file_);
  for (std::string line; std::getline(in, line);) {
    Note note;
    const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), note.step);
    if (error != std::errc{} || end == line.data() + line.size() || *end != '\t') {
      foreign_.push_back(line);
      continue;
    }
    note.text = line.substr(static_cast<size_t>(end - line.data()) + 1);
    notes_.push_back(note);
  }
  std::ranges::sort(notes_, {}, &Note::step);
}

const Note* Notes::at(int step) const {
  const auto found = std::ranges::find(notes_, step, &Note::step);
  return found == notes_.end() ? nullptr : &*found;
}

void Notes::set(int step, const std::string& text) {
  std::string line = text;
  std::ranges::replace(line, '\n', ' ');
  const auto found = std::ranges::find(notes_, step, &Note::step);
  if (found != notes_.end()) {
    found->text = line;
  } else {
    notes_.insert(std::ranges::upper_bound(notes_, step, {}, &Note::step), {step, line});
  }
  save();
}

void Notes::remove(int step) {
  std::erase_if(notes_, [&](const Note& note) { return note.step == step; });
  save();
}

void Notes::save() {
  problem_.clear();
  std::error_code error;
  if (notes_.empty() && foreign_.empty()) {
    std::filesystem::remove(file_, error);
    return;
  }
  std::filesystem::path fresh = file_;
  fresh += ".new";
  {
    std::ofstream out(fresh);
    for (const std::string& line : foreign_) out << line << '\n';
    for (const Note& note : notes_) out << note.step << '\t' << note.text << '\n';
    if (!out.flush()) {
      problem_ = file_.string() + ": the notes could not be written";
      return;
    }
  }
  std::filesystem::rename(fresh, file_, error);
  if (error) problem_ = file_.string() + ": " + error.message();
}

}  // namespace kvlapse::gui
