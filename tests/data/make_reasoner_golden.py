"""Writes reasoner_golden.safetensors: what transformers generates with the built-in model, for the engine's test.

    python tests/data/make_reasoner_golden.py        (torch, transformers, g++; fp32 on the CPU, a few minutes)

Twenty prompts across the families, 2000 greedy tokens each; the end token does not stop a run. A run in which the best
two logits ever come closer than MARGIN is left out, so that every correct fp32 engine must reproduce the tokens.
The right text of a problem is checked in one pass over all its tokens (the greedy run is the draft as far as every
token is the most probable one); only what follows is generated token by token.

  prompt_ids [sum] i32, prompt_off [21] i32   prompts one after the other
  gen_ids [20,2000] i32                       greedy tokens
  margin [20] f32                             smallest distance between the best two logits
  logit_step [20,16] i32                      steps with stored logits: those that chose gen_ids[i, step]
  logit_top_ids, logit_top [20,16,8] i32 f32  the best eight, descending
  full_prompt [2], full_step [2,4] i32        prompts and steps with all logits
  full_logits [2,4,96] f32
Metadata: families and seeds, versions, SHA-256 of model.safetensors.
"""
import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "models" / "train"))
import tasks  # noqa: E402

MODEL = REPOSITORY / "models" / "reasoner-6m"
TOKENS, SAMPLED, TOP, MARGIN = 2000, 16, 8, 0.005
FULL_STEPS = (0, 1, 777, 1999)
# family -> (size, prompts, seeds; more seeds than prompts take the place of runs with too small a margin). The right
# texts are longer than 2000 tokens, except chain's: its longest ones run on past their end for a hundred tokens.
WANTED = dict(sum=(180, 4, range(500, 507)), chain=(52, 2, (1228, 2123, 732, 2614, 2888)), prog=(76, 3, range(500, 506)),
              sort=(36, 3, range(500, 506)), walk=(200, 3, range(500, 506)), rotor=(200, 3, range(500, 506)),
              marathon=(390, 2, range(500, 505)))


@torch.no_grad()
def generate(model, prompt, draft):
    """Greedy tokens [TOKENS] and the logits of every step [TOKENS,V]; draft: what the tokens are expected to be."""
    draft = draft[:TOKENS]
    out = model(torch.tensor([prompt + draft]), use_cache=True)
    logits = out.logits[0, len(prompt) - 1:].float()  # one more than the draft has tokens
    agrees = logits[:-1].argmax(-1) == torch.tensor(draft)
    accepted = len(draft) if agrees.all() else int(agrees.long().argmin())
    tokens = draft[:accepted]
    logits = list(logits[:accepted + 1])
    cache = out.past_key_values
    if accepted < len(draft):
        cache.crop(accepted - len(draft))  # negative: that many tokens go
    while len(tokens) < TOKENS:
        tokens.append(int(logits[-1].argmax()))
        if len(tokens) < TOKENS:
            out = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
            logits.append(out.logits[0, -1].float())
    return torch.tensor(tokens, dtype=torch.int32), torch.stack(logits[:TOKENS])


def main():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(0)
    rows, left_out, missing = [], [], {family: count for family, (_, count, _) in WANTED.items()}
    for family, seed in ((f, seed) for f, (_, _, seeds) in WANTED.items() for seed in seeds):
        if not missing[family]:
            continue
        size = WANTED[family][0]
        problem = tasks.make(family, seed, size)
        ids, full = tokenizer(problem.prompt)["input_ids"], problem.completion + "<|end|>"
        tokens, logits = generate(model, ids, tokenizer(full)["input_ids"])
        best = logits.topk(2).values
        margin = (best[:, 0] - best[:, 1]).min()
        text = tokenizer.decode(tokens)
        right = full.startswith(text) or text.startswith(full)
        print(f"{family}:{seed} size {size}, prompt {len(ids)}, margin {margin:.4f}, right {right}", flush=True)
        if margin < MARGIN:
            left_out.append(f"{family}:{seed}")
            continue
        rows.append((family, seed, size, ids, tokens, logits, margin, right))
        missing[family] -= 1
    assert not any(missing.values()), f"too few runs with a margin of {MARGIN}: {missing}"
    steps = torch.stack([torch.randperm(TOKENS, generator=random)[:SAMPLED].sort().values for _ in rows])
    top = [r[5][s].topk(TOP) for r, s in zip(rows, steps)]
    full_prompt = (0, len(rows) - 1)
    lengths = torch.tensor([len(r[3]) for r in rows])
    tensors = dict(
        prompt_ids=torch.tensor([i for r in rows for i in r[3]], dtype=torch.int32),
        prompt_off=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int(),
        gen_ids=torch.stack([r[4] for r in rows]),
        margin=torch.stack([r[6] for r in rows]),
        logit_step=steps.int(),
        logit_top_ids=torch.stack([t.indices for t in top]).int(),
        logit_top=torch.stack([t.values for t in top]),
        full_prompt=torch.tensor(full_prompt, dtype=torch.int32),
        full_step=torch.tensor([FULL_STEPS] * 2, dtype=torch.int32),
        full_logits=torch.stack([rows[i][5][list(FULL_STEPS)] for i in full_prompt]))
    problems = [dict(family=r[0], seed=r[1], size=r[2], text_right=r[7]) for r in rows]
    metadata = dict(
        model=MODEL.name, weights_sha256=hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest(),
        problems=json.dumps(problems), left_out=json.dumps(left_out), dtype="fp32", device="cpu",
        torch=torch.__version__, transformers=transformers.__version__)
    out = Path(__file__).with_name("reasoner_golden.safetensors")
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(out), metadata)
    print(f"{out.name}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
