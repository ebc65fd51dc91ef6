#!/usr/bin/env python3
"""Decode and prompt speed of a GGUF file, ours against llama.cpp, same file, same threads, in one run.

Usage: llama_compare.py KVLAPSE FILE.gguf [--threads 2] [--contexts 512,2048,4096] [--steps 64] [--rounds 3]
Needs llama-cpp-python (PyPI builds it: CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python). Both sides take turns, so
that they see the same machine. llama.cpp runs with flash attention and without; its better median counts.
"""
import argparse
import json
import statistics
import subprocess
import time

import llama_cpp


def llama_rates(path, context, threads, steps, flash_attention):
    """(decode, prompt) in tokens a second."""
    model = llama_cpp.Llama(path, n_ctx=context + steps + 16, n_batch=512, n_threads=threads, n_threads_batch=threads,
                            flash_attn=flash_attention, verbose=False)
    n_vocab = model.n_vocab()
    prompt = [(i * 7919 + 13) % (n_vocab - 32) + 17 for i in range(context)]
    start = time.perf_counter()
    model.eval(prompt)
    prompt_rate = context / (time.perf_counter() - start)
    times = []
    for i in range(steps + 4):
        start = time.perf_counter()
        model.eval([prompt[i % context]])
        times.append(time.perf_counter() - start)
    model.close()
    return 1 / statistics.median(times[4:]), prompt_rate


def our_rates(binary, path, context, threads, steps, products):
    out = subprocess.run([binary, "bench", "decode", "--model", path, "--context", str(context), "--threads", str(threads),
                          "--steps", str(steps), "--products", products, "--json"],
                         check=True, capture_output=True, text=True)
    row = json.loads(out.stdout)["rows"][0]
    return row["tokens_per_s"], row["prompt_tokens_per_s"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kvlapse")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", default="512,2048,4096")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    print("| context | what | ours, exact | ours, int16 | llama.cpp | llama.cpp, flash attention | exact / better |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for context in map(int, args.contexts.split(",")):
        sides = {"exact": [], "int16": [], "plain": [], "flash": []}
        for _ in range(args.rounds):
            for products in ("exact", "int16"):
                sides[products].append(our_rates(args.kvlapse, args.model, context, args.threads, args.steps, products))
            for name, flash in (("plain", False), ("flash", True)):
                sides[name].append(llama_rates(args.model, context, args.threads, args.steps, flash))
        for index, what in enumerate(("decode", "prompt")):
            rate = {name: statistics.median(run[index] for run in runs) for name, runs in sides.items()}
            better = max(rate["plain"], rate["flash"])
            print(f"| {context} | {what} tok/s | {rate['exact']:.0f} | {rate['int16']:.0f} | {rate['plain']:.0f} | "
                  f"{rate['flash']:.0f} | {rate['exact'] / better:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
