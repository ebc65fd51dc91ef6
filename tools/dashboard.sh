#!/bin/sh
# dashboard.sh PRESET: turns the dashboard on in build/PRESET, so that the next build contains it. Where its libraries
# cannot be fetched, says so in one line and leaves it out; that is no failure.
set -eu
preset=$1
dir=build/$preset
if grep -qs '^KVLAPSE_GUI:BOOL=ON' "$dir/CMakeCache.txt"; then
  exit 0
fi
mkdir -p "$dir"
if cmake --preset "$preset" -DKVLAPSE_GUI=ON >"$dir/dashboard.log" 2>&1; then
  exit 0
fi
reason=$(grep -m 1 -o 'Could not fetch.*' "$dir/dashboard.log" || grep -m 1 'CMake Error' "$dir/dashboard.log" || echo "cmake failed")
cmake --preset "$preset" -DKVLAPSE_GUI=OFF >"$dir/configure.log" 2>&1 || { cat "$dir/configure.log"; exit 2; }
echo "dashboard: left out: $reason (all of it: $dir/dashboard.log)"
