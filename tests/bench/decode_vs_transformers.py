#!/usr/bin/env python3
"""One decode step at a given context, ours against transformers, same folder, same threads, in one run.

Usage: decode_vs_transformers.py KVLAPSE MODEL_FOLDER [--context 4096] [--threads 2] [--steps 32]
Needs torch and transformers; measures alternately, so that both see the same machine; prints medians and the ratio.
"""
import argparse
import json
import os
import statistics
import subprocess
import time


def transformers_times(folder, context, threads, steps):
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, context))
    times = []
    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        token = ids[:, -1:]
        for _ in range(steps + 4):
            start = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            times.append(1e3 * (time.perf_counter() - start))
    return times[4:]


def our_row(binary, folder, context, threads, steps):
    out = subprocess.run([binary, "bench", "decode", "--model", folder, "--context", str(context), "--threads",
                          str(threads), "--steps", str(steps), "--json"], check=True, capture_output=True, text=True)
    return json.loads(out.stdout)["rows"][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    ours, theirs = [], []
    for _ in range(3):
        ours.append(our_row(args.binary, args.model, args.context, args.threads, args.steps)["median"])
        theirs.append(statistics.median(transformers_times(args.model, args.context, args.threads, args.steps)))
    us, them = statistics.median(ours), statistics.median(theirs)
    print(f"context {args.context}, {args.threads} threads, fp32: kvlapse {us:.3f} ms, transformers {them:.3f} ms a token, "
          f"ratio {them / us:.2f} (medians of {len(ours)} alternating runs: {[round(t, 2) for t in ours]}, "
          f"{[round(t, 2) for t in theirs]})")


if __name__ == "__main__":
    main()
