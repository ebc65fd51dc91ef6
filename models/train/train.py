"""Trains the built-in reasoning model from scratch on one GPU.

    python models/train/train.py --out OUT                          both stages, one after the other
    python models/train/train.py --stage 1 --out A                  learns the tasks
    python models/train/train.py --stage 2 --resume A --out B       learns to live with evicted tokens (attention.py)

Everything is seeded and the schedule counts steps, so a run repeats up to the rounding of atomic sums on the GPU.
--seconds ends a stage early in an orderly way: the schedule then follows whichever of steps and time is further on.
Writes the model's folder (bf16 weights, configuration, tokenizer), fp32 weights in resume_*.safetensors for a later
stage, and train_log.json.
"""
import argparse
import json
import os
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import attention
import packing
import qwen3
import tasks
import vocabulary
from muon import Muon

MUON_RATE, ADAM_RATE = 0.02, 3e-3
# Sizes of the teacher-forced check: the default and a long one.
CHECK_SIZES = dict(sum=(100, 250), chain=(24, 44), prog=(34, 70), sort=(26, 42), walk=(120, 350), rotor=(120, 350),
                   marathon=(390,))


@dataclass(frozen=True)
class Stage:
    steps: int
    peak: float        # factor on the learning rates
    vanish: bool       # keys vanish
    curriculum: tuple  # (progress, longest document in tokens), ascending


STAGES = {
    1: Stage(6200, 1.0, False, ((0.0, 512), (0.02, 1024), (0.14, 2048), (0.33, 5120))),
    2: Stage(3800, 0.6, True, ((0.0, 2048), (0.41, 5120))),
}


def rate_factor(step, progress):
    """Warms up over 100 steps, holds, and falls linearly to zero over the second half."""
    return min(1.0, (step + 1) / 100) * min(1.0, (1.0 - progress) / 0.5)


class Curriculum:
    """Longest document of a pack, from its index and from the progress in time (a class: worker processes get a copy)."""

    def __init__(self, stage, packs_per_step):
        self.points, self.packs = stage.curriculum, stage.steps * packs_per_step

    def __call__(self, index, progress):
        progress = max(progress, index / self.packs)
        return [longest for start, longest in self.points if progress >= start][-1]


def loss_of(x, norm, embedding, targets, weight):
    logits = qwen3.read_out(x, norm, embedding)
    return (F.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()


def compiled_parts(compile_it):
    wrap = (lambda f: torch.compile(f, dynamic=False)) if compile_it else (lambda f: f)
    return SimpleNamespace(project=wrap(qwen3.project), finish=wrap(qwen3.finish), loss=wrap(loss_of),
                           flex=wrap(flex_attention))


@torch.no_grad()
def check(model, count, device, parts, tokens=131072, sizes=CHECK_SIZES):
    """Share of problems whose every token is the most probable one, teacher-forced. Not compiled: shapes vary."""
    result = {}
    for family, family_sizes in sizes.items():
        for size in family_sizes:
            todo = [tasks.make(family, 1_000_000 + i, size) for i in range(count)]
            right = []
            while todo:
                documents, used = [], 0
                while todo and used + 5120 <= tokens:
                    problem = todo.pop()
                    prompt = vocabulary.encode(problem.prompt)
                    ids = vocabulary.encode(problem.prompt + problem.completion + vocabulary.END)
                    documents.append((prompt, ids))
                    used += len(ids)
                batch = packing.to_device([packing.pack(iter(documents), tokens)], device)
                x = model(batch.tokens, batch.position, attention.plain(batch), compiled=parts)
                wrong = (model.logits(x).argmax(-1) != batch.targets) & (batch.weight > 0)
                wrong_before = F.pad(wrong.long().cumsum(0), (1, 0)).cpu()
                bounds = batch.bounds.cpu()
                right += [bool(wrong_before[bounds[i + 1]] == wrong_before[bounds[i]]) for i in range(len(documents))]
            result[f"{family}/{size}"] = round(sum(right) / len(right), 4)
    return result


def train(model, stage, args, parts, log):
    device = args.device
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    server = packing.PackServer(f"{args.seed}/{stage.vanish}", args.tokens // 2, Curriculum(stage, 2), args.workers)
    start, last_log, last_save = time.time(), time.time(), time.time()
    step, seen = 0, 0
    while True:
        in_time = (time.time() - start) / args.seconds if args.seconds else 0.0
        progress = max(step / stage.steps, in_time)
        if progress >= 1:
            break
        server.progress.value = in_time
        batch = packing.to_device([server.next(), server.next()], device)
        attend = attention.vanishing(batch, model.config, parts.flex) if stage.vanish else attention.plain(batch)
        x = model(batch.tokens, batch.position, attend, dtype=args.dtype, compiled=parts)
        loss = parts.loss(x, model.model.norm.weight, model.model.embed_tokens.weight, batch.targets, batch.weight)
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        factor = stage.peak * rate_factor(step, progress)
        for group in adam.param_groups:
            group["lr"] = ADAM_RATE * factor
        adam.step()
        muon.step(MUON_RATE * factor)
        model.zero_grad(set_to_none=True)
        step += 1
        seen += args.tokens
        if step % args.log_every == 0:
            now = time.time()
            entry = dict(step=step, seconds=round(now - start, 1), loss=round(loss.item(), 5), longest=batch.longest,
                         tokens_per_s=round(args.log_every * args.tokens / (now - last_log)))
            last_log = now
            log(entry)
        if time.time() - last_save > args.save_every:
            qwen3.save(model, args.out)
            last_save = time.time()
    server.close()
    qwen3.save(model, args.out)
    log(dict(done=True, steps=step, tokens=seen, seconds=round(time.time() - start, 1)))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--stage", type=int, choices=(1, 2), help="one stage only; default: both")
    ap.add_argument("--resume", help="folder with the weights to start from")
    ap.add_argument("--out", required=True)
    ap.add_argument("--seconds", type=float, help="end each stage after this time at the latest")
    ap.add_argument("--steps", type=int, help="in place of the stage's number of steps")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--tokens", type=int, default=131072, help="tokens in a step")
    ap.add_argument("--check", type=int, default=64, help="problems for the check at the end, per family and size")
    ap.add_argument("--save-every", type=float, default=100, help="seconds between checkpoints")
    ap.add_argument("--log-every", type=int, default=100)
    ap.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    ap.add_argument("--tiny", action="store_true", help="a very small model, to try the script on a CPU")
    args = ap.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.manual_seed(args.seed)
    parts = compiled_parts(args.device == "cuda")
    config = qwen3.Config(width=32, layers=2, q_heads=4, kv_heads=2, head_dim=16, mlp_width=64) if args.tiny \
        else qwen3.Config()
    model = qwen3.load(args.resume, args.device, config) if args.resume else qwen3.Reasoner(config).to(args.device)
    os.makedirs(args.out, exist_ok=True)
    entries = []

    def log(entry):
        entries.append(entry)
        print(json.dumps(entry), flush=True)
        with open(f"{args.out}/train_log.json", "w") as f:
            f.write("[\n" + ",\n".join(json.dumps(e) for e in entries) + "\n]\n")

    device_name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    log(dict(parameters=sum(p.numel() for p in model.parameters()), device=device_name, torch=torch.__version__,
             seed=args.seed, tokens_per_step=args.tokens, seconds=args.seconds))
    for number in (args.stage,) if args.stage else (1, 2):
        stage = STAGES[number]
        if args.steps:
            stage = Stage(args.steps, stage.peak, stage.vanish, stage.curriculum)
        log(dict(stage=number, steps_planned=stage.steps))
        train(model, stage, args, parts, log)
    if args.check:
        log(dict(text_exact_teacher_forced=check(model, args.check, args.device, parts, args.tokens), n=args.check))


if __name__ == "__main__":
    main()
