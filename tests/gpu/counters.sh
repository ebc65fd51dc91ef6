#!/bin/bash
# Recordings on a GPU with its activity, memory traffic and counters, from the folder that bundle.sh made. Usage, in a
# source tree: counters.sh BUNDLE. KVLAPSE_PROBE_ONLY=1: the range profiler's ways and our own cost alone.
set -u
here=$(cd "$1" && pwd)
export KVLAPSE_MODELS=$PWD/models LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
timeout 20 "$here/kvlapse" doctor || status=1
# Ways of asking the range profiler, a process each; the second is what counted nothing.
for ways in "target=1 ranges=64" "target=0 ranges=2048" "target=1 ranges=2048" "target=1 ranges=64 launch=graph" \
  "target=1 ranges=2048 launch=graph" "target=1 ranges=64 start=early" "target=1 ranges=64 context=null" \
  "target=1 ranges=64 range=user" "target=1 ranges=64 range=user launch=graph"; do
  printf 'range profiler, %s: ' "$ways"
  timeout 30 "$here/counters_probe" $ways || echo "exit status $?"
done
# What of the cost of activity is ours (the rest of CuptiOnGpu.Cost's figure is CUPTI's).
timeout 30 "$here/activity_bench" || status=1
[ -z "${KVLAPSE_PROBE_ONLY:-}" ] || exit $status
for counters in none activity dram kernels none activity dram; do
  timeout 100 "$here/kvlapse" record --device cuda --policy longflow --budget 512 --max-tokens 1500 --ignore-eos --tier events \
    --counters $counters --counter-steps 4 -o "$work/$counters.kvl" --force --json -q >"$work/$counters.json" || status=1
  python3 -c "
import json, sys
d = json.load(open(sys.argv[1]))
print(f\"{sys.argv[2]}: {d['generated_tokens']} tokens, {d['tokens_per_s']:.0f} tok/s, {d['trace_bytes'] / 1e6:.1f} MB\")" "$work/$counters.json" $counters
done
for counters in activity dram kernels; do
  "$here/kvlapse" info "$work/$counters.kvl" | grep -A3 counters
  "$here/kvlapse" verify "$work/$counters.kvl" || status=1
done
"$here/kvlapse" sql "$work/dram.kvl" "SELECT l.launch, l.phase, count(*) AS n, round(avg(k.\"end\" - k.start) / 1e3, 2) AS us,
  round(avg(l.modelled_bytes)) AS modelled FROM KV_LAUNCH l JOIN CUPTI_ACTIVITY_KIND_KERNEL k ON k.rowid = l.kernel
  GROUP BY 1, 2 ORDER BY n * us DESC" || status=1
"$here/kvlapse" sql "$work/dram.kvl" "SELECT count(*) AS samples, sum(read_bytes) AS read, sum(write_bytes) AS written,
  (SELECT sum(modelled_bytes) FROM KV_LAUNCH) AS modelled FROM KV_DRAM_SAMPLE" || status=1
"$here/kvlapse" sql "$work/kernels.kvl" "SELECT launch, count(*) AS n, round(avg(duration_ns)) AS ns, round(avg(dram_read_bytes)) AS read,
  round(avg(l2_bytes)) AS l2, round(avg(modelled_bytes)) AS modelled FROM KV_KERNEL_COUNTER GROUP BY 1 ORDER BY 2 DESC" || status=1
exit $status
