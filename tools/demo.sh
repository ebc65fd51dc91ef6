#!/bin/sh
# demo.sh PROGRAM: records a generation of the built-in model, replays it, verifies it and prints the comparison.
set -eu
kvlapse=$1
out=${DEMO_OUT:-build/demo}
mkdir -p "$out"

stage() { printf '\n== %s\n' "$*"; }

stage "1/6 record: the built-in model thinks about its longest task, everything goes into $out/full.kvl"
"$kvlapse" record --force -q -o "$out/full.kvl"

stage "2/6 record the same tokens while LongFlow and R-KV really evict (2000 tokens, 512 slots)"
"$kvlapse" record --force -q --teacher "$out/full.kvl" --max-tokens 2000 --policy longflow --budget 512 -o "$out/longflow.kvl"
"$kvlapse" record --force -q --teacher "$out/full.kvl" --max-tokens 2000 --policy rkv --budget 512 -o "$out/rkv.kvl"

stage "3/6 verify: every checksum and invariant of the three recordings"
"$kvlapse" verify "$out/full.kvl" "$out/longflow.kvl" "$out/rkv.kvl"

stage "4/6 self-replay: the recorded policies must choose the same victims again, all of them"
"$kvlapse" replay --self "$out/longflow.kvl"
"$kvlapse" replay --self "$out/rkv.kvl"

stage "5/6 layer 0 is closed: open-loop replay of the full recording against the run that evicted"
"$kvlapse" replay --self "$out/longflow.kvl" --layer0-of "$out/full.kvl"

stage "6/6 replay: policies and budgets over the one recording"
"$kvlapse" replay "$out/full.kvl" --policy streaming_llm,random:pin_prompt=1,longflow,rkv --budget 10%,25%,50% --force -o "$out/compare.kvr"

printf '\nNext: %s view %s/full.kvl %s/compare.kvr\n' "$kvlapse" "$out" "$out"
