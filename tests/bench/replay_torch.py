"""A plain PyTorch replay, the yardstick for `kvlapse replay`: one policy at a time, a layer at a time, matrix product and
masked softmax, the same metrics, the same number of threads. Values are random with the shape of the built-in model's
trace (the time does not depend on them).

    python tests/bench/replay_torch.py --threads 2                  # four configurations, seconds for each and for 32
    kvlapse replay run.kvl -j 2 --policy longflow,h2o,random,streaming_llm --budget 10%,15%,20%,25%,30%,35%,40%,50% -o r.kvr
"""

import argparse
import time

import torch

SINKS, TOP_K, BLOCK = 4, 10, 256


def decide(policy, budget, q, k, v, prompt, generator):
    """held [H, T, T] bool: may token i be attended at step t. One victim a step, as the live policies."""
    n_q, n, dim = q.shape
    n_kv = k.shape[0]
    group = n_q // n_kv
    scale = dim**-0.5
    held = torch.zeros(n_kv, n, n, dtype=torch.bool)
    mask = torch.zeros(n_kv, n, dtype=torch.bool)
    norms = v.abs().sum(-1)
    total = torch.zeros(n_kv, n)
    for t in range(n):
        mask[:, t] = True
        held[:, t] = mask
        attends = policy in ("longflow", "h2o")
        if attends and (t >= prompt or policy == "h2o"):
            keys = k[:, : t + 1].repeat_interleave(group, 0)
            logits = torch.bmm(keys, q[:, t].unsqueeze(-1)).squeeze(-1) * scale
            seen = mask[:, : t + 1].repeat_interleave(group, 0)
            weights = torch.softmax(logits.masked_fill(~seen, float("-inf")), -1).view(n_kv, group, t + 1)
            if policy == "h2o":
                total[:, : t + 1] += weights.mean(1)
        if t < max(prompt, budget - 1):
            continue
        infinite = float("inf")
        if policy == "longflow":
            score = (weights * norms[:, None, : t + 1]).sum((0, 1)).masked_fill(~mask[0, : t + 1], infinite)
            mask[:, score.argmin()] = False
        elif policy == "h2o":
            score = total[:, : t + 1].masked_fill(~mask[:, : t + 1], infinite)
            score[:, t + 1 - budget // 2 :] = infinite
            mask.scatter_(1, score.argmin(-1, keepdim=True), False)
        elif policy == "random":
            score = torch.rand(n_kv, t + 1, generator=generator).masked_fill(~mask[:, : t + 1], infinite)
            mask.scatter_(1, score.argmin(-1, keepdim=True), False)
        else:  # streaming_llm
            mask[:, SINKS + t - budget + 1] = False
    return held


def measure(held, q, k, v, prompt):
    """Sums over heads and generated steps, and the samples that quantiles need."""
    n_q, n, dim = q.shape
    group = n_q // k.shape[0]
    keys, values = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    out = {name: [] for name in ("recall", "no_sinks", "error", "cosine", "topk")}
    for begin in range(prompt, n, BLOCK):
        end = min(n, begin + BLOCK)
        logits = torch.bmm(q[:, begin:end], keys[:, :end].transpose(1, 2)) * dim**-0.5
        causal = torch.arange(end)[None, :] > torch.arange(begin, end)[:, None]
        logits.masked_fill_(causal, float("-inf"))
        seen = held[:, begin:end, :end].repeat_interleave(group, 0)
        full = torch.softmax(logits, -1)
        kept = torch.softmax(logits.masked_fill(~seen, float("-inf")), -1)
        reference, output = torch.bmm(full, values[:, :end]), torch.bmm(kept, values[:, :end])
        out["recall"].append((full * seen).sum(-1))
        out["no_sinks"].append((full * seen)[..., SINKS:].sum(-1) / full[..., SINKS:].sum(-1))
        out["error"].append((output - reference).norm(dim=-1) / reference.norm(dim=-1))
        out["cosine"].append(1 - torch.cosine_similarity(output, reference, dim=-1))
        out["topk"].append(seen.gather(-1, full.topk(TOP_K, -1).indices).float().mean(-1))
    joined = {name: torch.cat(parts, 1).flatten() for name, parts in out.items()}
    return {name: (x.mean().item(), torch.quantile(x, torch.tensor([0.1, 0.5, 0.9])).tolist()) for name, x in joined.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=130)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--measured-layers", type=int, default=1, help="layers that are timed; the rest is a multiple")
    parser.add_argument("--configurations", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    shape = (args.tokens, 64)
    q, k, v = torch.randn(8, *shape), torch.randn(4, *shape), torch.randn(4, *shape)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for policy in ("longflow", "h2o", "random", "streaming_llm"):
        start = time.perf_counter()
        for _ in range(args.measured_layers):
            held = decide(policy, args.tokens // 4, q, k, v, args.prompt, generator)
            result = measure(held, q, k, v, args.prompt)
        spent = (time.perf_counter() - start) * args.layers / args.measured_layers
        seconds.append(spent)
        print(f"{policy:14} {spent:8.1f} s for {args.layers} layers   recall {result['recall'][0]:.4f}", flush=True)
    mean = sum(seconds) / len(seconds)
    print(f"mean {mean:.1f} s a configuration; {args.configurations} configurations: {mean * args.configurations:.0f} s")


if __name__ == "__main__":
    main()
