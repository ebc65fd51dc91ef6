// Selection: what the person looks at. One for the whole program; every panel follows it and every panel may
// set it. Owned by the UI thread; jobs get copies.
#pragma once

namespace kvlapse::gui {

struct Selection {
  int sequence = 0;
  int step = 0;  // position of the newest token, so the state after its eviction
  int layer = 0;
  int kv_head = 0;
  int token_begin = 0, token_end = 0;  // [begin, end), empty: no range
  int pinned_token = -1;               // -1: none

  bool has_range() const { return token_end > token_begin; }
  bool operator==(const Selection&) const = default;
};

// Play position. `loop` repeats the selected token range.
struct Playback {
  bool playing = false;
  double steps_per_second = 60;
  bool loop = false;
  double fraction = 0;  // of a step, carried between frames
};

}  // namespace kvlapse::gui
