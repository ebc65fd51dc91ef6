"""Packed training batches: problems one after the other in a row of fixed length, made by worker processes.

Pack i depends on (seed, i, longest allowed document) alone, and packs are consumed in order of i, so the data of a run
do not depend on the number of workers or on their timing.
"""
import multiprocessing
import random
from dataclasses import dataclass

import numpy as np
import torch

import tasks
import vocabulary

MAX_DOCUMENTS = 512  # in one pack; document starts are padded to this number with empty documents

# Share of the training tokens. sum and prog are the families that a short training learns worst.
SHARES = dict(sum=0.18, chain=0.19, prog=0.17, sort=0.14, walk=0.11, rotor=0.14, marathon=0.07)


def largest_size(family, tokens):
    """A size whose problems seldom exceed `tokens`; longer ones are drawn again."""
    low, high, _ = tasks.FAMILIES[family]
    guess = dict(sum=tokens // 16, chain=tokens // 24, prog=tokens // 36, sort=int((tokens / 2.2) ** 0.5),
                 walk=(tokens - 100) // 12, rotor=(tokens - 100) // 12, marathon=high)[family]
    return max(low, min(high, guess))


class ProblemStream:
    """Endless training problems no longer than `max_tokens`, keeping the families' shares of tokens."""

    def __init__(self, seed, max_tokens):
        self.random, self.max_tokens = random.Random(seed), max_tokens
        self.shares = {f: s for f, s in SHARES.items() if f != "marathon" or max_tokens >= 5120}
        self.used = {f: self.random.random() * 2000 * s for f, s in self.shares.items()}

    def __next__(self):
        family = min(self.shares, key=lambda f: self.used[f] / self.shares[f])
        low = tasks.FAMILIES[family][0]
        while True:
            size = self.random.randint(low, largest_size(family, self.max_tokens))
            problem = tasks.make(family, tasks.TRAINING_SEEDS + self.random.getrandbits(62), size)
            prompt = vocabulary.encode(problem.prompt)
            ids = np.concatenate([prompt, vocabulary.encode(problem.completion + vocabulary.END)])
            if len(ids) <= self.max_tokens:
                self.used[family] += len(ids)
                return prompt, ids


@dataclass
class Pack:
    """tokens, targets, weight (1 where the target is the model's own text), position, in_prompt: [n]; starts of documents."""
    tokens: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    position: np.ndarray
    in_prompt: np.ndarray
    starts: np.ndarray
    longest: int


def pack(documents, n):
    """documents: iterator of (prompt ids, all ids). Stops at its end or when the pack is full; the last is cut."""
    tokens, targets = np.zeros(n, np.uint8), np.zeros(n, np.uint8)
    weight, in_prompt = np.zeros(n, np.float32), np.zeros(n, bool)
    position = np.zeros(n, np.int64)
    starts, at, longest = [], 0, 1
    for prompt, ids in documents:
        length = min(len(ids), n - at)
        end = at + length
        tokens[at:end] = ids[:length]
        targets[at:end - 1] = ids[1:length]
        weight[at + len(prompt) - 1:end - 1] = 1
        position[at:end] = np.arange(length)
        in_prompt[at:at + len(prompt)] = True
        starts.append(at)
        longest = max(longest, length)
        at = end
        if at >= n or len(starts) == MAX_DOCUMENTS - 1:
            break
    while at < n:  # what is left becomes documents of padding, none longer than the longest real one
        starts.append(at)
        length = min(n - at, max(longest, (n - at) // max(1, MAX_DOCUMENTS - len(starts)) + 1))
        position[at:at + length] = np.arange(length)
        longest = max(longest, length)
        at += length
    return Pack(tokens, targets, weight, position, in_prompt, np.array(starts, np.int32), longest)


@dataclass
class Batch:
    tokens: torch.Tensor
    targets: torch.Tensor
    weight: torch.Tensor
    position: torch.Tensor
    in_prompt: torch.Tensor
    bounds: torch.Tensor  # [documents + 1] i32, ends padded with the number of tokens
    longest: int


def to_device(packs, device):
    def joined(field, dtype=None):
        t = torch.from_numpy(np.concatenate([getattr(p, field) for p in packs])).to(device, non_blocking=True)
        return t if dtype is None else t.to(dtype)

    n = len(packs[0].tokens)
    bounds = np.full(MAX_DOCUMENTS * len(packs) + 1, n * len(packs), np.int32)
    starts = np.concatenate([p.starts + i * n for i, p in enumerate(packs)])
    bounds[:len(starts)] = starts
    return Batch(joined("tokens", torch.long), joined("targets", torch.long), joined("weight"), joined("position"),
                 joined("in_prompt"), torch.from_numpy(bounds).to(device), max(p.longest for p in packs))


def _work(seed, first, stride, tokens, max_tokens_of, progress, queue):
    i = first
    while True:
        stream = ProblemStream(f"{seed}/{i}", max_tokens_of(i, progress.value))
        queue.put(pack(iter(stream.__next__, None), tokens))
        i += stride


class PackServer:
    """Worker processes; next() returns packs in order. `max_tokens_of(pack index, shared progress)` is the curriculum."""

    def __init__(self, seed, tokens, max_tokens_of, workers):
        self.progress = multiprocessing.Value("d", 0.0)
        self.queues = [multiprocessing.Queue(4) for _ in range(workers)]
        self.processes = [
            multiprocessing.Process(target=_work, daemon=True,
                                    args=(seed, w, workers, tokens, max_tokens_of, self.progress, self.queues[w]))
            for w in range(workers)]
        for p in self.processes:
            p.start()
        self.index = 0

    def next(self):
        queue = self.queues[self.index % len(self.queues)]
        self.index += 1
        return queue.get()

    def close(self):
        for p in self.processes:
            p.terminate()
