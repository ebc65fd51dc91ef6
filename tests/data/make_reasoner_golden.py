"""Writes reasoner_golden.safetensors: what transformers generates with the built-in model, for the engine's test.

    python tests/data/make_reasoner_golden.py        (torch, transformers, g++; fp32 on the CPU, a few minutes)

Twenty prompts across the families, 2000 greedy tokens each; the end token does not stop a run. A run in which the best
two logits ever come closer than MARGIN is left out, so that every correct fp32 engine must reproduce the tokens.

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
TOKENS, SAMPLED, TOP, MARGIN = 2000, 16, 8, 0.02
FULL_STEPS = (0, 1, 777, 1999)
# family -> (size, prompts). The right texts are longer than 2000 tokens, except chain's, which run on past their end.
WANTED = dict(sum=(180, 4), chain=(52, 2), prog=(76, 3), sort=(36, 3), walk=(200, 3), rotor=(200, 3), marathon=(390, 2))
SPARE, FIRST_SEED = 2, 500  # runs more than wanted, to take the place of those with too small a margin


@torch.no_grad()
def generate(model, prompts, pad):
    """Greedy tokens [runs,TOKENS] and the logits of every step [runs,TOKENS,V]. One batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    cache, tokens, logits = None, [], []
    for step in range(TOKENS):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                    logits_to_keep=1)
        cache = out.past_key_values
        logits.append(out.logits[:, -1].float())
        ids = logits[-1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        tokens.append(ids)
        if step % 100 == 99:
            print(f"step {step + 1}", flush=True)
    return torch.cat(tokens, 1).int(), torch.stack(logits, 1)


def main():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(0)
    candidates = [tasks.make(family, FIRST_SEED + i, size)
                  for family, (size, count) in WANTED.items() for i in range(count + (SPARE if family == "chain" else 0))]
    prompts = [tokenizer(p.prompt)["input_ids"] for p in candidates]
    all_tokens, all_logits = generate(model, prompts, tokenizer.pad_token_id)
    rows, left_out, missing = [], [], {family: count for family, (_, count) in WANTED.items()}
    for problem, ids, tokens, logits in zip(candidates, prompts, all_tokens, all_logits):
        family, size = problem.family, WANTED[problem.family][0]
        best = logits.topk(2).values
        margin = (best[:, 0] - best[:, 1]).min()
        text, full = tokenizer.decode(tokens), problem.completion + "<|end|>"
        right = full.startswith(text) or text.startswith(full)
        print(f"{family}:{problem.seed} size {size}, prompt {len(ids)}, margin {margin:.4f}, right {right}", flush=True)
        if margin < MARGIN:
            left_out.append(f"{family}:{problem.seed}")
        elif missing[family]:
            rows.append((family, problem.seed, size, ids, tokens, logits, margin, right))
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
