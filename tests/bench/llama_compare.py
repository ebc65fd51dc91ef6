#!/usr/bin/env python3
"""Decode and prompt speed of a GGUF file, ours against llama.cpp, same file, same threads, in one run.

Usage: llama_compare.py KVLAPSE FILE.gguf [--threads 2] [--contexts 512,2048,4096] [--steps 48] [--rounds 3]
                        [--run-under COMMAND]
Needs llama-cpp-python (PyPI builds it: CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python). Every measurement
is a process of its own; the sides take turns, so that they see the same machine. llama.cpp runs with flash attention
and without, its better median counts; K/V is fp16 on both sides, which is its default. COMMAND goes before every
measuring process (taskset, nice).
"""
import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time


def measure_llama(path, context, threads, steps, flash_attention):
    """Prints (decode, prompt) in tokens a second."""
    import llama_cpp

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
    print(json.dumps([1 / statistics.median(times[4:]), prompt_rate]))


def run(args, command):
    result = subprocess.run(shlex.split(args.run_under) + command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit {result.returncode}\n{result.stderr}")
    return json.loads(result.stdout)


def llama_rates(args, context, flash_attention):
    return run(args, [sys.executable, __file__, args.kvlapse, args.model, "--threads", str(args.threads), "--contexts",
                      str(context), "--steps", str(args.steps), "--llama", "flash" if flash_attention else "plain"])


def our_rates(args, context, products):
    row = run(args, [args.kvlapse, "bench", "decode", "--model", args.model, "--context", str(context), "--threads",
                     str(args.threads), "--steps", str(args.steps), "--kv-dtype", "fp16", "--products", products,
                     "--json"])["rows"][0]
    return row["tokens_per_s"], row["prompt_tokens_per_s"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kvlapse")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", default="512,2048,4096")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run-under", default="")
    parser.add_argument("--llama", choices=["plain", "flash"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.llama:
        return measure_llama(args.model, int(args.contexts), args.threads, args.steps, args.llama == "flash")

    print("| context | what | int16 (default) | exact | llama.cpp | llama.cpp, flash attention | int16 / better | "
          "exact / better |\n|--:| --- |--:|--:|--:|--:|--:|--:|")
    for context in map(int, args.contexts.split(",")):
        sides = {"int16": [], "exact": [], "plain": [], "flash": []}
        for _ in range(args.rounds):
            for products in ("int16", "exact"):
                sides[products].append(our_rates(args, context, products))
            for name in ("plain", "flash"):
                sides[name].append(llama_rates(args, context, name == "flash"))
        for index, what in enumerate(("decode", "prompt")):
            rate = {name: statistics.median(measured[index] for measured in all_rounds)
                    for name, all_rounds in sides.items()}
            better = max(rate["plain"], rate["flash"])
            print(f"| {context} | {what} tok/s | {rate['int16']:.0f} | {rate['exact']:.0f} | {rate['plain']:.0f} | "
                  f"{rate['flash']:.0f} | {rate['int16'] / better:.2f}x | {rate['exact'] / better:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
