#!/bin/sh
# build.sh PRESET JOBS: configures once, builds, and leaves build/kvlapse pointing at the program.
set -eu
preset=$1
jobs=$2
dir=build/$preset
if [ ! -f "$dir/build.ninja" ]; then
  echo "configure: preset $preset"
  mkdir -p "$dir"
  cmake --preset "$preset" >"$dir/configure.log" 2>&1 || { cat "$dir/configure.log"; exit 2; }
fi
echo "build: $dir with $jobs jobs"
if [ -t 1 ]; then
  ninja -C "$dir" -j "$jobs"
else
  ninja -C "$dir" -j "$jobs" --quiet || ninja -C "$dir" -j 1
fi
ln -sfn "$preset/kvlapse" build/kvlapse
