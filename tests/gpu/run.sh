#!/bin/sh
# Runs every GPU test and the attention bench with its peers, from the folder that bundle.sh made; a compact table
# comes last. Usage: run.sh [RESULT_DIR]. KVLAPSE_SANITIZE=1 adds compute-sanitizer on the small cases.
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/results}
mkdir -p "$out"
# For our binaries alone: the machine's Python has its own.
libraries="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
status=0
started=$(date +%s)
stage() { echo "== $1 ($(($(date +%s) - started)) s)"; }

stage machine
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader

stage tests
timeout "${KVLAPSE_TEST_SECONDS:-120}" env LD_LIBRARY_PATH="$libraries" "$here/gpu_tests" --gtest_brief=1 >"$out/tests.log" 2>&1 || status=1
tail -n 40 "$out/tests.log"

if [ "${KVLAPSE_SANITIZE:-0}" = 1 ]; then
  for tool in memcheck racecheck; do
    stage "compute-sanitizer $tool"
    timeout 120 env LD_LIBRARY_PATH="$libraries" compute-sanitizer --tool $tool --error-exitcode 9 "$here/gpu_tests" --gtest_brief=1 \
      --gtest_filter='*Graph*:*Overlapping*' >"$out/$tool.log" 2>&1 || status=1
    tail -n 3 "$out/$tool.log"
  done
fi

stage bench
timeout "${KVLAPSE_BENCH_SECONDS:-120}" env LD_LIBRARY_PATH="$libraries" "$here/attention_bench" "$out/attention.jsonl" 2>&1 || status=1
stage peers
timeout "${KVLAPSE_PEER_SECONDS:-120}" python3 "$here/peers.py" "$out/peers.jsonl" >"$out/peers.log" 2>&1 || status=1
tail -n 2 "$out/peers.log"
stage table
python3 "$here/attention_table.py" "$out/attention.jsonl" "$out/peers.jsonl" | tee "$out/table.txt" || status=1
stage end
exit $status
