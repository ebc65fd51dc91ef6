#!/bin/bash
# The engine on a GPU, from the folder that bundle.sh made: its tests, recordings that are replayed on the CPU, decode
# figures. Usage, in a source tree (models and test data are taken from there): engine.sh BUNDLE [RESULT_DIR]
set -u
here=$(cd "$1" && pwd)
out=$(mkdir -p "${2:-$here/results}" && cd "${2:-$here/results}" && pwd)
export KVLAPSE_TEST_DATA=$PWD/tests/data KVLAPSE_MODELS=$PWD/models
export LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
started=$(date +%s)
status=0
stage() { echo "== $1 ($(($(date +%s) - started)) s)"; }

stage machine
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
stage tests
timeout -k 5 90 "$here/gpu_tests" --gtest_brief=1 --gtest_filter='GpuEngine.*:GpuFastDecoder.*:GpuDevice.*' || status=1
timeout 20 "$here/kvlapse" doctor || status=1

stage recordings
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
show() {  # NAME RECORD_JSON
  python3 -c "
import json, sys
d = json.load(open(sys.argv[2]))
print(f\"{sys.argv[1]}: {d['generated_tokens']} tokens, {d['tokens_per_s']:.0f} tok/s, {d['evictions']} evictions, \"
      f\"{d['trace_bytes'] / 1e6:.1f} MB, recording cost {100 * d['overhead_ratio']:.1f} %\")" "$1" "$2"
}
for device in cpu cuda; do
  timeout 120 "$here/kvlapse" record --device $device -o "$work/$device.kvl" --json -q >"$work/$device.json" || status=1
  show "full, $device" "$work/$device.json"
done
python3 - "$work/cpu.json" "$work/cuda.json" <<'P' || status=1
import json, sys
cpu, cuda = (json.load(open(f)) for f in sys.argv[1:])
print("text of the GPU is the CPU's:", cpu["text"] == cuda["text"])
sys.exit(cpu["text"] != cuda["text"])
P
for policy in longflow longflow:granularity=kv_head random streaming_llm rkv h2o; do
  timeout 100 "$here/kvlapse" record --device cuda --policy "$policy" --budget 512 --teacher "$work/cuda.kvl" --max-tokens 2000 \
    -o "$work/p.kvl" --force --json -q >"$work/p.json" || status=1
  show "$policy, 512 slots" "$work/p.json"
  "$here/kvlapse" replay "$work/p.kvl" --self || status=1
  "$here/kvlapse" verify "$work/p.kvl" || status=1
done
for policy in full longflow longflow:granularity=kv_head tova caote; do
  timeout 60 "$here/kvlapse" record --device cuda --decoder fused --policy "$policy" --budget 512 --max-tokens 2000 --ignore-eos \
    -o "$work/f.kvl" --force --json -q >"$work/f.json" || status=1
  show "$policy, 512 slots, fused" "$work/f.json"
  "$here/kvlapse" verify "$work/f.kvl" || status=1
done
timeout 60 "$here/kvlapse" record --device cuda --decoder fused --task sort:1 --batch 20 --max-tokens 1000 --ignore-eos \
  --policy longflow --budget 256 -o "$work/f.kvl" --force --json -q >"$work/f.json" || status=1
show "batch of 20, longflow, 256 slots, fused" "$work/f.json"
for tier in events qkv; do
  timeout 60 "$here/kvlapse" record --device cuda --task sort:1 --batch 20 --max-tokens 1000 --ignore-eos --policy longflow \
    --budget 256 --tier $tier -o "$work/b.kvl" --force --json -q >"$work/b.json" || status=1
  show "batch of 20, longflow, 256 slots, $tier" "$work/b.json"
done
"$here/kvlapse" replay "$work/b.kvl" --self || status=1

stage decode
rm -f "$out/decode.jsonl"
for model in qwen3_8b qwen3_1_7b; do
  for at in "1 512" "1 16384" "32 3200" "128 3200"; do
    set -- $at
    timeout 90 "$here/kvlapse" bench decode --device cuda --model "$KVLAPSE_TEST_DATA/model_configs/$model" --batch "$1" \
      --context "$2" --steps 24 | tee -a "$out/decode.txt" || status=1
  done
done
stage "end, status $status"
exit $status
