"""Accuracy of the model's own greedy generations: full cache on fresh problems, and policies x budgets.

    python models/train/closed_loop.py MODEL_FOLDER --out OUT [--what greedy,table,marathon] [--n 64] [--deadline S]

Every (policy, budget, problem) is one row of a batch and really generates from its own, evicted cache (eviction.py).
Writes closed_loop.json: for each family and cell the right answers of n with a 95 % Wilson interval, the share of exact
texts, and the mean share of the text before the first wrong character.
"""
import argparse
import json
import os
import time
from types import SimpleNamespace

import numpy as np
import torch

import decode_attention
import qwen3
import tasks
import vocabulary
from eviction import POLICIES, Cell

TABLE_POLICIES = (
    "streaming_llm", "streaming_llm:pin_prompt=1", "random", "random:pin_prompt=1", "random:recent=32",
    "random:pin_prompt=1:recent=32", "rkv", "longflow", "longflow:pin_prompt=1:recent=32", "tova", "h2o")
TABLE_BUDGETS = (64, 128, 256, 512, 1024)
MARATHON_POLICIES = ("streaming_llm", "random:pin_prompt=1:recent=32", "rkv", "longflow",
                     "longflow:pin_prompt=1:recent=32", "h2o")
MARATHON_BUDGETS = (256, 512, 1024, 2048)
TABLE_SEED, GREEDY_SEED = 0, 10_000
SLACK = 64  # a row may run on this much past the right length before it counts as derailed


@torch.no_grad()
def generate(model, problems, cells, attention, dtype, check_budget=False):
    """Tokens [len(cells) * len(problems), N], rows by cell; cells of one policy must be adjacent."""
    c, device = model.config, model.cos.device
    want = [vocabulary.encode(p.prompt + p.completion + vocabulary.END) for p in problems]
    prompts = [len(p.prompt) for p in problems]
    per_cell, rows = len(problems), len(problems) * len(cells)
    positions = max(map(len, want)) + SLACK
    shape = SimpleNamespace(layers=c.layers, q_heads=c.q_heads, kv_heads=c.kv_heads, head_dim=c.head_dim,
                            positions=positions, device=device)

    policies, names = [], list(dict.fromkeys(cell.name for cell in cells))
    names.sort(key=lambda name: POLICIES[name].needs_attention)  # those that read attention weights last
    assert [cell.name for cell in cells] == sorted((cell.name for cell in cells), key=names.index), "order of cells"
    for name in names:
        mine = [i for i, cell in enumerate(cells) if cell.name == name]
        span = slice(mine[0] * per_cell, (mine[-1] + 1) * per_cell)
        policy = POLICIES[name]([cells[i] for i in mine for _ in problems], prompts * len(mine), shape)
        policies.append((span, policy))
    first_row = min([s.start for s, p in policies if p.needs_attention], default=rows)

    tokens = np.zeros((per_cell, positions), np.int64)
    for i, w in enumerate(want):
        tokens[i, :prompts[i]] = w[:prompts[i]]
    tokens = torch.from_numpy(tokens).to(device).repeat(len(cells), 1)
    prompt = torch.tensor(prompts * len(cells), device=device)
    stop = torch.tensor([len(w) for w in want] * len(cells), device=device) + SLACK // 2
    cache = [torch.zeros(rows, c.kv_heads, positions, c.head_dim, device=device, dtype=dtype)
             for _ in range(2 * c.layers)]
    alive = [torch.ones(rows, c.kv_heads, positions, device=device, dtype=torch.bool) for _ in range(c.layers)]
    end, finished = vocabulary.ID[vocabulary.END], torch.zeros(rows, device=device, dtype=torch.bool)
    limit = torch.tensor([cell.budget + (128 if cell.name == "rkv" else 0) or positions for cell in cells
                          for _ in problems], device=device)

    for t in range(positions - 1):
        n = t + 1

        def attend(i, q, k, v):
            keys, values = cache[2 * i], cache[2 * i + 1]
            keys[:, :, t], values[:, :, t] = k, v
            if check_budget:
                held = alive[i][:, :, :n].sum(-1).amax(-1)
                assert bool(((held <= limit) | (t < prompt)).all()), f"over budget at step {t}"
            out, p = attention(q, keys, values, alive[i], n, first_row)
            for span, policy in policies:
                mine = p[span.start - first_row:span.stop - first_row] if policy.needs_attention else None
                policy.step(i, t, q[span], v[span], mine, keys[span], alive[i][span])
            return out

        at = torch.full((rows,), t, device=device)
        hidden = model(tokens[:, t], at, attend, dtype=dtype)
        best = model.logits(hidden).argmax(-1)
        tokens[:, n] = torch.where(n < prompt, tokens[:, n], best)
        finished |= (n >= prompt) & ((tokens[:, n] == end) | (n > stop))
        if n % 32 == 0 and bool(finished.all()):
            break
    return tokens.cpu().numpy()


def judge(row, problem):
    """(answer right, text exact, share of the text before the first wrong token, tokens generated)."""
    ids = vocabulary.ID
    want = vocabulary.encode(problem.completion + vocabulary.END)
    got = row[len(problem.prompt):]
    ends = np.flatnonzero(got == ids[vocabulary.END])
    length = int(ends[0]) + 1 if len(ends) else len(got)
    common = min(length, len(want))
    wrong = np.flatnonzero(got[:common] != want[:common])
    before = int(wrong[0]) if len(wrong) else common
    right = False
    if len(ends):
        tags = np.flatnonzero(got[:length] == ids[vocabulary.END_THINK])
        if len(tags):
            answer = got[tags[-1] + 1:length - 1]
            right = np.array_equal(answer, vocabulary.encode(problem.answer))
    return right, before == len(want) == length, before / len(want), length


def wilson(right, n, z=1.959964):
    share, denominator = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / denominator
    half = z * ((share * (1 - share) + z * z / (4 * n)) / n) ** 0.5 / denominator
    return max(0.0, middle - half), min(1.0, middle + half)


def summary(rows, problems):
    judged = [judge(r, p) for r, p in zip(rows, problems)]
    n, right = len(judged), sum(j[0] for j in judged)
    low, high = wilson(right, n)
    return dict(n=n, correct=right, accuracy=round(right / n, 4), ci95_low=round(low, 4), ci95_high=round(high, 4),
                text_exact=round(sum(j[1] for j in judged) / n, 4), prefix_share=round(np.mean([j[2] for j in judged]), 4),
                tokens_mean=round(float(np.mean([j[3] for j in judged])), 1))


def sort_cells(cells):
    order = sorted({c.name for c in cells}, key=lambda name: (POLICIES[name].needs_attention, name))
    return sorted(cells, key=lambda c: order.index(c.name))  # stable: budgets stay in order


def tables(model, families, policies, budgets, args, attention):
    """One table per family; all of them in one batch."""
    start = time.time()
    problems = [tasks.make(f, TABLE_SEED + i, args.size) for f in families for i in range(args.n)]
    cells = sort_cells([Cell("full", 0)] + [Cell(p, b) for p in policies for b in budgets])
    longest_prompt = {f: max(len(p.prompt) for p in problems if p.family == f) for f in families}
    cells = [c for c in cells if any(c.feasible(x) for x in longest_prompt.values())]
    tokens = generate(model, problems, cells, attention, args.dtype, args.check_budget)
    results = {}
    for k, family in enumerate(families):
        mine = problems[k * args.n:(k + 1) * args.n]
        rows = []
        for i, cell in enumerate(cells):
            if cell.feasible(longest_prompt[family]):
                first = i * len(problems) + k * args.n
                found = summary(tokens[first:first + args.n], mine)
                rows.append(dict(task=family, policy=cell.policy, budget_slots=cell.budget, **found))
        results[family] = dict(
            task=family, seeds=[TABLE_SEED, TABLE_SEED + args.n - 1], size=args.size or tasks.FAMILIES[family][2],
            prompt_mean=round(np.mean([len(p.prompt) for p in mine]), 1), prompt_max=longest_prompt[family],
            generated_mean=round(np.mean([len(vocabulary.encode(p.completion)) + 1 for p in mine]), 1), rows=rows)
        print_table(results[family], policies, budgets, time.time() - start)
    return results


def print_table(result, policies, budgets, seconds):
    full = next(r for r in result["rows"] if r["policy"] == "full")
    print(f"\n{result['task']}: prompt {result['prompt_mean']}, generated {result['generated_mean']}, "
          f"full cache {100 * full['accuracy']:.0f} %, {seconds:.0f} s\n| policy | " + " | ".join(map(str, budgets)) +
          " |\n| --- |" + " --: |" * len(budgets))
    found = {(r["policy"], r["budget_slots"]): r for r in result["rows"]}
    for policy in policies:
        cells = [found.get((policy, b)) for b in budgets]
        texts = [f"{100 * c['accuracy']:.0f} ({100 * c['prefix_share']:.0f})" if c else "-" for c in cells]
        print(f"| {policy} | " + " | ".join(texts) + " |", flush=True)


def greedy(model, args, attention):
    """Full cache, fp32 arithmetic on the stored weights, default sizes."""
    families = [f for f in args.families if f != "marathon"]
    batches = [families] + ([["marathon"]] if "marathon" in args.families else [])
    rows = []
    for batch in batches:
        start = time.time()
        problems = [tasks.make(f, GREEDY_SEED + i, args.size if f != "marathon" else 0)
                    for f in batch for i in range(args.n_greedy)]
        tokens = generate(model, problems, [Cell("full", 0)], attention, torch.float32)
        for i, family in enumerate(batch):
            span = slice(i * args.n_greedy, (i + 1) * args.n_greedy)
            row = dict(task=family, policy="full", **summary(tokens[span], problems[span]))
            row["tokens_min"] = min(judge(r, p)[3] for r, p in zip(tokens[span], problems[span]))
            rows.append(row)
            print(json.dumps(row), flush=True)
        print(f"greedy {','.join(batch)}: {time.time() - start:.0f} s", flush=True)
    return dict(seeds=[GREEDY_SEED, GREEDY_SEED + args.n_greedy - 1], rows=rows)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--out", required=True)
    ap.add_argument("--what", default="greedy,table,marathon")
    ap.add_argument("--families", default=",".join(tasks.FAMILIES))
    ap.add_argument("--n", type=int, default=64)
    ap.add_argument("--n-greedy", type=int, default=200)
    ap.add_argument("--n-marathon", type=int, default=32)
    ap.add_argument("--size", type=int, default=0)
    ap.add_argument("--budgets", default=",".join(map(str, TABLE_BUDGETS)))
    ap.add_argument("--policies", default=",".join(TABLE_POLICIES))
    ap.add_argument("--together", action="store_true", help="all short families in one batch (memory: few policies)")
    ap.add_argument("--deadline", type=float, default=1e9, help="seconds after which no further part is begun")
    ap.add_argument("--check-budget", action="store_true")
    args = ap.parse_args()
    args.families = args.families.split(",")
    start = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    attention = decode_attention.with_torch
    if device == "cuda":
        difference = max(decode_attention.difference_to_torch(device, d) for d in (torch.bfloat16, torch.float32))
        print(f"Triton attention differs from PyTorch's by {difference:.5f}", flush=True)
        assert difference < 0.05
        attention = decode_attention.WithTriton()
    model = qwen3.load(args.model, device)
    for p in model.parameters():
        p.data = p.data.bfloat16().float()  # what the stored file holds
    result = dict(device=torch.cuda.get_device_name() if device == "cuda" else "cpu", torch=torch.__version__,
                  date=time.strftime("%Y-%m-%d"), table_dtype=str(args.dtype))

    def store(more):
        result.update(more)
        os.makedirs(args.out, exist_ok=True)
        with open(f"{args.out}/closed_loop.json", "w") as f:
            json.dump(result, f)
        if device == "cuda":
            torch.cuda.empty_cache()

    def in_time(what):
        if time.time() - start < args.deadline:
            return True
        print(f"no time for {what}", flush=True)
        return False

    if "greedy" in args.what and in_time("greedy"):
        store(dict(greedy=greedy(model, args, attention)))
    if "table" in args.what:
        budgets = tuple(int(b) for b in args.budgets.split(","))
        short = [f for f in args.families if f != "marathon"]
        for families in ([short] if args.together else [[f] for f in short]):
            if families and in_time(families):
                store(tables(model, families, args.policies.split(","), budgets, args, attention))
    if "marathon" in args.what and "marathon" in args.families and in_time("marathon"):
        args.n, args.size = args.n_marathon, 0
        store(tables(model, ["marathon"], MARATHON_POLICIES, MARATHON_BUDGETS, args, attention))


if __name__ == "__main__":
    main()
