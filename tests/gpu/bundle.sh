#!/bin/sh
# Packs everything that needs a GPU into one folder that runs on another machine: test and bench binaries, the shared
# libraries they load, the scripts. Usage: tests/gpu/bundle.sh BUILD_DIR OUTPUT_DIR; there: sh OUTPUT_DIR/run.sh, and in a
# source tree bash OUTPUT_DIR/engine.sh OUTPUT_DIR
set -eu
build=$1
out=$2
source=$(cd "$(dirname "$0")/../.." && pwd)
rm -rf "$out"
mkdir -p "$out/lib"
for binary in kvlapse tests/gpu_tests tests/attention_bench tests/counters_probe tests/activity_bench; do
  cp "$build/$binary" "$out/"
  strip "$out/$(basename "$binary")"
  # Not the C library: its loader must be the machine's own.
  ldd "$build/$binary" | awk '$3 ~ /^\// { print $3 }' |
    grep -v -E '/(libc|libm|libdl|libpthread|librt|ld-linux[^/]*)\.so' | xargs -r -I{} cp -Lf {} "$out/lib/"
done
cp "$source"/tests/data/gold_public_*.safetensors "$out/"
cp "$source/tests/gpu/run.sh" "$source/tests/gpu/engine.sh" "$source/tests/gpu/counters.sh" "$source/tests/bench/peers.py" "$source/tests/bench/rkv_peer.py" \
  "$source/tests/bench/attention_table.py" "$out/"
du -sh "$out"
