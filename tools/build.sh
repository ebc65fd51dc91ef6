#!/bin/sh
# build.sh PRESET JOBS [TARGET]: configures once, builds, and leaves build/kvlapse pointing at the program.
set -eu
preset=$1
jobs=$2
target=${3:-all}
dir=build/$preset
if [ ! -f "$dir/build.ninja" ]; then
  echo "configure: preset $preset"
  mkdir -p "$dir"
  cmake --preset "$preset" >"$dir/configure.log" 2>&1 || { cat "$dir/configure.log"; exit 2; }
fi
echo "build: $dir with $jobs jobs"
if [ -t 1 ]; then
  ninja -C "$dir" -j "$jobs" "$target"
else
  ninja -C "$dir" -j "$jobs" --quiet "$target"
fi
ln -sfn "$preset/kvlapse" build/kvlapse
