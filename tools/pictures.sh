#!/bin/sh
# pictures.sh PROGRAM: three pictures of what demo.sh recorded, drawn without a display. A program without the
# dashboard draws none and says so.
set -eu
kvlapse=$1
out=${DEMO_OUT:-build/demo}
printf '\n== pictures of the run that evicted, and of the comparison\n'
if ! "$kvlapse" view "$out/longflow.kvl" "$out/compare.kvr" --size 1600x900 --step 1500 --layer 3 --head 1 \
  --screenshot "$out/dashboard.png" --panel all --screenshot "$out/token_lives.png" --panel life-map \
  --screenshot "$out/compare.png" --panel compare 2>"$out/pictures.log"; then
  echo "no pictures: $(head -n 1 "$out/pictures.log")"
  exit 0
fi
ls "$out"/dashboard.png "$out"/token_lives.png "$out"/compare.png
