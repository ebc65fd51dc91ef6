#!/bin/sh
# demo.sh PROGRAM: records a generation of the built-in model, replays it, verifies it and prints the comparison.
set -eu
kvlapse=$1
out=${DEMO_OUT:-build/demo}
mkdir -p "$out"

stage() { printf '\n== %s\n' "$*"; }

# start COMMAND: runs it beside the others that were started; finish: waits for all, prints what they said in their order.
jobs=
start() {
  "$@" >"$out/said.$(echo "$jobs" | wc -w)" 2>&1 &
  jobs="$jobs $!"
}
finish() {
  status=0 i=0
  for job in $jobs; do
    wait "$job" || status=$?
    cat "$out/said.$i"
    i=$((i + 1))
  done
  rm -f "$out"/said.*
  jobs=
  return $status
}

stage "1/4 record: the built-in model thinks about its longest task, everything goes into $out/full.kvl"
"$kvlapse" record --force -q --kv-dtype bf16 -o "$out/full.kvl"

stage "2/4 record the same tokens while LongFlow and R-KV really evict (2000 tokens, 512 slots)"
evicting() { "$kvlapse" record --force -q --kv-dtype bf16 -j 1 --teacher "$out/full.kvl" --max-tokens 2000 --policy "$1" --budget 512 -o "$out/$1.kvl"; }
start evicting longflow
start evicting rkv
finish

stage "3/4 check: every checksum and invariant; self-replay: the recorded policies must choose the same victims again, all of
   them; and layer 0 of the full recording, replayed open loop, must evict what the run with the same tokens evicted"
start "$kvlapse" verify "$out/full.kvl" "$out/longflow.kvl" "$out/rkv.kvl"
start "$kvlapse" replay --self "$out/longflow.kvl"
start "$kvlapse" replay --self "$out/rkv.kvl"
start "$kvlapse" replay --self "$out/longflow.kvl" --layer0-of "$out/full.kvl"
start "$kvlapse" replay --self "$out/rkv.kvl" --layer0-of "$out/full.kvl"
finish

stage "4/4 replay: policies and budgets over the one recording, between random eviction and an oracle that knows the future"
"$kvlapse" replay "$out/full.kvl" --policy streaming_llm,random:pin_prompt=1,longflow,rkv,oracle_mass --budget 10%,25% --force -o "$out/compare.kvr"

printf '\nNext: %s view %s/full.kvl %s/compare.kvr\n' "$kvlapse" "$out" "$out"
