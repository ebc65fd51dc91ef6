#!/bin/sh
# gallery.sh PROGRAM FOLDER [view's files and options]: every panel alone, its further views and all panels together, at
# 1280x800, 1920x1080 and 2x scale, in the three themes, as PNG in FOLDER, for looking at. SIZES, THEMES and VIEWS (a
# regular expression) choose some.
set -eu
kvlapse=$1
out=$2
shift 2
mkdir -p "$out"
list=$(mktemp)
trap 'rm -f "$list"' EXIT

# name, then what `view --panel` takes
grep -E "^(${VIEWS:-.*}) " >"$list" <<'VIEWS'
all all
timeline timeline
heads head-grid:0 0
heads-list head-grid:1 1
heads-entropy head-grid:2 0
heads-recall head-grid:3 0
heads-error head-grid:4 0
lives life-map:0 0 0 0
lives-slots life-map:0 1 0 0
lives-attention life-map:0 0 1 0
lives-layer life-map:1 0 0 0
lives-heads life-map:2 0 0 0
lives-against life-map:0 0 0 3
text text:0
text-lifetime text:1
text-attention text:2
text-regret text:3
compare compare:0
compare-error compare:1
compare-accuracy compare:3
recordings recordings
what-if what-if
memory memory
bandwidth bandwidth:0
roofline bandwidth:1
kernels kernels
sql sql
info info
VIEWS

picture() { # SIZE THEME FILES...
  size=$1 theme=$2
  shift 2
  if [ "$size" = 2x ]; then
    set -- "$@" --size 2560x1600 --scale 2
  else
    set -- "$@" --size "$size" --scale 1
  fi
  while read -r name panel; do
    set -- "$@" --screenshot "$out/$size-$theme-$name.png" --panel "$panel"
  done <"$list"
  "$kvlapse" view --theme "$theme" "$@"
}

for size in ${SIZES:-1280x800 1920x1080 2x}; do
  for theme in ${THEMES:-dark light colour-blind}; do
    picture "$size" "$theme" "$@"
  done
done
