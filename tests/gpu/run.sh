#!/bin/sh
# Runs every GPU test and the attention bench with its peers, from the folder that bundle.sh made; a compact table
# comes last. Usage: run.sh [RESULT_DIR]. Stages that would begin after KVLAPSE_SECONDS (default 400) are left out.
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/results}
mkdir -p "$out"
rm -f "$out"/*.jsonl "$out"/*.log
# For our binaries alone: the machine's Python has its own.
libraries="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
status=0
started=$(date +%s)
elapsed() { echo $(($(date +%s) - started)); }
# stage NAME SECONDS: whether it may begin.
stage() {
  echo "== $1 ($(elapsed) s)"
  [ $(($(elapsed) + $2)) -le "${KVLAPSE_SECONDS:-400}" ] || { echo "left out: no time"; return 1; }
}
ours() {
  seconds=$1
  shift
  timeout -k 5 "$seconds" env LD_LIBRARY_PATH="$libraries" KVLAPSE_GPU_TEST_DATA="$here" "$@"
}

stage machine 1
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
grep RmProfilingAdminOnly /proc/driver/nvidia/params
ls /usr/local/cuda*/lib64/libcupti.so* /usr/local/cuda*/extras/CUPTI/lib64/libcupti.so* 2>/dev/null
# One process a test: one that hangs takes nobody with it.
hung=
for test in EveryCase WithFp8 LeaveOneOut TunedPlans ThousandSteps Graph Overlapping Victims; do
  for path in bulk cp_async; do
    [ "$hung" != $path ] || continue
    stage "test $test $path" 10 || continue
    ours 25 "$here/gpu_tests" --gtest_brief=1 --gtest_filter="*$test*/$path" >"$out/test.log" 2>&1
    code=$?
    [ $code -eq 0 ] || status=1
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then hung=$path; fi  # the rest of this path would hang as well
    cat "$out/test.log" >>"$out/tests.log"
    grep -v '^Running\|^Note' "$out/test.log" | tail -n 12
  done
done
# The profiler's tests in processes of their own: it has one state a process.
for test in GpuReplay.Small GpuReplay.Victims GpuReplay.Metrics GpuRkv. CuptiOnGpu.EveryKernel CuptiOnGpu.Dram CuptiOnGpu.Counted CuptiOnGpu.TheFused CuptiOnGpu.Cost; do
  stage "test $test" 10 || continue
  ours 40 "$here/gpu_tests" --gtest_brief=1 --gtest_filter="$test*" >"$out/test.log" 2>&1 || status=1
  cat "$out/test.log" >>"$out/tests.log"
  grep -v '^Running\|^Note' "$out/test.log" | tail -n 14
done
rm -f "$out/test.log"
stage bench 15 && { ours 40 "$here/attention_bench" "$out/attention.jsonl" 16 999 2>&1 || status=1; }
stage "bench small batches" 15 && { ours 40 "$here/attention_bench" "$out/attention.jsonl" 1 15 2>&1 || status=1; }
stage "bench fp8" 10 && { ours 40 "$here/attention_bench" "$out/fp8.jsonl" fp8 2>&1 || status=1; }
stage "bench leave one out" 15 && { ours 40 "$here/attention_bench" "$out/leave_one_out.jsonl" caote 2>&1 || status=1; }
stage peers 30 && { timeout 80 python3 "$here/peers.py" "$out/peers.jsonl" >"$out/peers.log" 2>&1 || status=1; tail -n 3 "$out/peers.log"; }
stage rkv 15 && { ours 40 "$here/attention_bench" "$out/rkv.jsonl" rkv 2>&1 || status=1; timeout 40 python3 "$here/rkv_peer.py" "$out/rkv_peer.jsonl" 2>&1 || status=1; }
stage replay 30 && { ours 90 "$here/kvlapse" bench replay --device cuda --configs 32 --json >"$out/replay.json" || status=1; cat "$out/replay.json"; }
stage sweep 20 && { ours 45 "$here/attention_bench" "$out/sweep.jsonl" sweep 2>&1 || status=1; }
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    cases=SmallCases
    [ $tool = racecheck ] && cases=CasesOfExchange
    for path in bulk cp_async; do
      stage "$tool $path" 30 || continue
      ours 90 compute-sanitizer --tool $tool --error-exitcode 9 "$here/gpu_tests" --gtest_brief=1 \
        --gtest_filter="*$cases*/$path" >"$out/$tool.$path.log" 2>&1 || { echo "exit status $?"; status=1; }
      tail -n 4 "$out/$tool.$path.log"
    done
    stage "$tool rkv" 15 || continue
    ours 90 compute-sanitizer --tool $tool --error-exitcode 9 "$here/gpu_tests" --gtest_brief=1 \
      --gtest_filter='GpuRkv.Small*' >"$out/$tool.rkv.log" 2>&1 || { echo "exit status $?"; status=1; }
    tail -n 4 "$out/$tool.rkv.log"
  done
fi
if command -v ncu >/dev/null; then
  for shape in "32 3276" "1 3276" "8 16384"; do
    stage "ncu $shape" 12 || continue
    ours 25 ncu --clock-control none -k regex:decode_step --launch-skip 6 --launch-count 1 --section SpeedOfLight \
      --section MemoryWorkloadAnalysis --section WarpStateStats --section SchedulerStats \
      --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum "$here/attention_bench" /dev/null one $shape \
      >>"$out/ncu.log" 2>&1 || echo "ncu failed: $(tail -n 1 "$out/ncu.log")"
  done
  # Which kernel of a compaction holds the time.
  for shape in "1 1024" "64 1024"; do
    stage "ncu rkv $shape" 12 || continue
    ours 25 ncu --clock-control none -k regex:rkv_ --launch-skip 4 --launch-count 4 --section SpeedOfLight --section Occupancy \
      --metrics dram__bytes_read.sum,gpu__time_duration.sum "$here/attention_bench" /dev/null rkv $shape >>"$out/ncu_rkv.log" 2>&1 ||
      echo "ncu failed: $(tail -n 1 "$out/ncu_rkv.log")"
    grep -E "rkv_[a-z]+_kernel|gpu__time_duration" "$out/ncu_rkv.log" | tail -n 8
  done
fi
stage table 0
python3 "$here/attention_table.py" "$out/attention.jsonl" "$out/peers.jsonl" "$out/fp8.jsonl" | tee "$out/table.txt" || status=1
echo "== end ($(elapsed) s), status $status"
exit $status
