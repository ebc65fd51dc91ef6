"""Eviction for closed-loop evaluation: many (policy, budget, problem) rows in one batch, eviction as a mask.

Step t of every row: append k and v at position t, attend over the living positions, then evict. A budget B is the
number of slots that an attention may see, the newest token included; so B - 1 live on after a step. R-KV is different:
it compacts to B at (t+1) % 128 == 0 only, so that its attentions see up to B + 128. The prompt is read without
eviction; when it is longer than B - 1 it is cut once, at its last token. Keys keep their original rotary positions.

Shapes: R rows of one policy, Hq query heads, H kv heads, G = Hq/H, N positions, n = t+1 of them used, D head dim.
Masking gives the right tokens and says nothing about speed.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SINKS = 4             # streaming_llm
SNAP_WINDOW = 32      # longflow's prefill cut: the last 32 queries of the prompt decide, SnapKV with average pooling 5
RKV_WINDOW, RKV_KERNEL, RKV_LAMBDA, RKV_THRESHOLD, RKV_CADENCE = 8, 7, 0.07, 0.5, 128


@dataclass(frozen=True)
class Cell:
    """One row of the table: a policy as the command line spells it, and a budget (0: none)."""
    policy: str
    budget: int

    @property
    def name(self):
        return self.policy.split(":")[0]

    @property
    def options(self):
        return dict(o.split("=") for o in self.policy.split(":")[1:])

    def protected(self, prompt):
        """(first positions, newest positions) that are never evicted."""
        first = prompt if self.options.get("pin_prompt") == "1" else 0
        newest = int(self.options.get("recent", 0))
        if self.name == "streaming_llm":
            first = max(first, SINKS)
        if self.name == "h2o":
            newest = max(newest, self.budget // 2)
        return first, newest

    def feasible(self, prompt):
        return self.name in ("full", "rkv") or sum(self.protected(prompt)) < self.budget


class Policy:
    """Scores of the rows of one policy in all layers; the lowest living, unprotected score is evicted."""

    def __init__(self, cells, prompts, shape):
        """cells, prompts: one per row. shape: namespace with layers, q_heads, kv_heads, head_dim, positions, device."""
        self.shape, self.rows = shape, len(cells)
        self.prompt = torch.tensor(prompts, device=shape.device)
        self.budget = torch.tensor([c.budget for c in cells], device=shape.device)
        protected = torch.tensor([c.protected(p) for c, p in zip(cells, prompts)], device=shape.device)
        self.first, self.newest = protected[:, :1], protected[:, 1:]
        self.protection_step = -1
        self.smallest = min(c.budget for c in cells)
        self.cut_at = {}  # step -> rows whose prompt is longer than their budget allows
        for row, (cell, prompt) in enumerate(zip(cells, prompts)):
            if prompt > cell.budget - 1:
                self.cut_at.setdefault(prompt - 1, []).append(row)

    needs_attention = False

    def per_layer(self, *size, dtype=torch.float32):
        return [torch.zeros(self.rows, *size, device=self.shape.device, dtype=dtype) for _ in range(self.shape.layers)]

    def observe(self, layer, t, q, v, p):
        """Sees every step. q [R,Hq,D], v [R,H,D], p [R,Hq,n] (only with needs_attention)."""

    def score(self, layer, t, p):
        """[R,H or 1,n]"""
        raise NotImplementedError

    def prefill_score(self, layer, t, rows, keys, p):
        """Like score, for the cut of the prompt of some rows: [r,H or 1,n]. keys [R,H,N,D]."""
        return self.score(layer, t, p)[rows]

    def step(self, layer, t, q, v, p, keys, alive):
        """Evicts in alive [R,H,N] (bool, changed in place)."""
        self.observe(layer, t, q, v, p)
        n = t + 1
        if t in self.cut_at:
            rows = torch.tensor(self.cut_at[t], device=self.shape.device)
            score = self.prefill_score(layer, t, rows, keys, p).float()
            score = score.masked_fill(self.protection(t)[rows], torch.inf).expand(-1, alive.shape[1], -1)
            rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
            alive[rows, :, :n] = rank < (self.budget[rows] - 1)[:, None, None]
        if n >= self.smallest:
            evicting = (t >= self.prompt) & (n >= self.budget)
            untouchable = ~alive[:, :, :n] | self.protection(t)
            victim = torch.where(untouchable, torch.inf, self.score(layer, t, p)).argmin(-1, keepdim=True)
            # Rows that do not evict write what is there already.
            alive.scatter_(2, victim, alive.gather(2, victim) & ~evicting[:, None, None])

    def protection(self, t):
        """[R,1,n], the same for all layers of a step."""
        if self.protection_step != t:
            at = torch.arange(t + 1, device=self.shape.device)[None]
            self.protection_mask = ((at < self.first) | (at > t - self.newest))[:, None]
            self.protection_step = t
        return self.protection_mask


class Full(Policy):
    def step(self, *_):
        pass


class StreamingLlm(Policy):
    """The oldest unprotected position goes."""

    def score(self, layer, t, p):
        return torch.arange(t + 1, device=self.shape.device, dtype=torch.float32).expand(self.rows, 1, -1)


class Random(Policy):
    """Uniform, per kv head and layer."""

    def score(self, layer, t, p):
        return torch.rand(self.rows, self.shape.kv_heads, t + 1, device=self.shape.device)


class Tova(Policy):
    """Attention of this step, summed over the layer's heads; shared by the heads."""
    needs_attention = True

    def score(self, layer, t, p):
        return p.sum(1, keepdim=True)


class LongFlow(Policy):
    """|attention * value| of this step, summed over query heads and dims; shared by the heads. Prompt cut: SnapKV."""
    needs_attention = True

    def __init__(self, *args):
        super().__init__(*args)
        s = self.shape
        self.value_norm = self.per_layer(s.kv_heads, s.positions)
        self.queries = self.per_layer(s.q_heads, SNAP_WINDOW, s.head_dim)

    def observe(self, layer, t, q, v, p):
        self.value_norm[layer][:, :, t] = v.float().abs().sum(-1)
        if t <= max(self.cut_at, default=-1):
            self.queries[layer][:, :, t % SNAP_WINDOW] = q.float()

    def score(self, layer, t, p):
        grouped = p.unflatten(1, (self.shape.kv_heads, -1)).sum(2)
        return (grouped * self.value_norm[layer][:, :, :t + 1]).sum(1, keepdim=True)

    def prefill_score(self, layer, t, rows, keys, p):
        n, s = t + 1, self.shape
        prefix = n - SNAP_WINDOW
        q = self.queries[layer][rows].unflatten(1, (s.kv_heads, -1))               # [r,H,G,w,D]
        logits = torch.einsum("rhgwd,rhnd->rhgwn", q, keys[rows, :, :prefix].float()) * s.head_dim ** -0.5
        mass = logits.softmax(-1).sum((1, 2, 3))                                   # [r,prefix]
        pooled = F.avg_pool1d(mass[:, None], 5, 1, 2)
        return F.pad(pooled, (0, SNAP_WINDOW), value=torch.inf)


class H2o(Policy):
    """Attention summed over time (and over the query heads of a group), per kv head; the newest half is protected."""
    needs_attention = True

    def __init__(self, *args):
        super().__init__(*args)
        self.total = self.per_layer(self.shape.kv_heads, self.shape.positions)

    def observe(self, layer, t, q, v, p):
        self.total[layer][:, :, :t + 1] += p.unflatten(1, (self.shape.kv_heads, -1)).sum(2)

    def score(self, layer, t, p):
        return self.total[layer][:, :, :t + 1]


class Rkv(Policy):
    """Importance minus redundancy per kv head, every 128 tokens, in the slot order of the authors' code.

    After a compaction the slots are in descending order of score with the window last; pooling and "last similar key"
    of the next compaction work in that order, so the order is kept in slots[layer] [R,H,capacity].
    """

    def __init__(self, *args):
        super().__init__(*args)
        s = self.shape
        self.queries = self.per_layer(s.q_heads, RKV_WINDOW, s.head_dim)
        capacity = max(int(self.budget.max()) + RKV_CADENCE, int(self.prompt.max())) + 1
        self.slots = self.per_layer(s.kv_heads, capacity, dtype=torch.long)
        self.held = self.per_layer(dtype=torch.long)
        self.ends = set(prompt - 1 for prompt in self.prompt.tolist())

    def step(self, layer, t, q, v, p, keys, alive):
        self.queries[layer][:, :, t % RKV_WINDOW] = q.float()
        held = self.held[layer]
        at = held[:, None, None].expand(-1, self.shape.kv_heads, 1)
        self.slots[layer].scatter_(2, at, t)
        held += 1
        on_cadence = (t + 1) % RKV_CADENCE == 0
        if not on_cadence and t not in self.ends:
            return
        due = (t == self.prompt - 1) | ((t >= self.prompt) & on_cadence)
        groups = {}
        for row, (is_due, budget, count) in enumerate(zip(due.tolist(), self.budget.tolist(), held.tolist())):
            if is_due and count >= budget:
                groups.setdefault((budget, count), []).append(row)
        for (budget, count), rows in groups.items():
            rows = torch.tensor(rows, device=self.shape.device)
            for some in rows.split(32):
                self.compact(layer, t, some, budget, count, keys, alive)
            held[rows] = budget

    def compact(self, layer, t, rows, budget, count, keys, alive):
        s = self.shape
        slots = self.slots[layer][rows, :, :count]
        k = keys[rows[:, None, None], torch.arange(s.kv_heads, device=s.device)[:, None], slots].float()  # [r,H,S,D]
        kept = slots.gather(2, rkv_keep(self.queries[layer][rows], k, budget))
        self.slots[layer][rows, :, :budget] = kept
        living = torch.zeros_like(alive[rows])
        living[:, :, t + 1:] = True  # positions to come
        alive[rows] = living.scatter_(2, kept, True)


def rkv_keep(queries, k, budget):
    """Indices of the kept slots in their new order, [r,H,budget]. queries [r,Hq,w,D] in any order, k [r,H,S,D]."""
    count, w = k.shape[2], RKV_WINDOW
    logits = torch.einsum("rhgwd,rhsd->rhgws", queries.unflatten(1, (k.shape[1], -1)), k[:, :, :-w])
    importance = (logits.amax(2) * k.shape[3] ** -0.5).softmax(-1).mean(2)          # [r,H,S-w]
    importance = F.max_pool1d(importance, RKV_KERNEL, 1, RKV_KERNEL // 2)

    unit = k / (k.norm(dim=-1, keepdim=True) + 1e-8)
    similar = unit @ unit.mT                                                        # [r,H,S,S]
    similar.diagonal(dim1=-2, dim2=-1).zero_()
    at = torch.arange(count, device=k.device)
    last = torch.where(similar > RKV_THRESHOLD, at, 0).amax(-1, keepdim=True)       # 0 when there is none
    similar.scatter_(-1, last, 0.0)
    redundancy = similar.mean(-2).softmax(-1)[..., :-w]

    score = RKV_LAMBDA * importance - (1 - RKV_LAMBDA) * redundancy
    best = score.topk(budget - w, -1).indices
    window = at[count - w:].expand(*best.shape[:2], -1)
    return torch.cat([best, window], -1)


POLICIES = dict(full=Full, streaming_llm=StreamingLlm, random=Random, tova=Tova, longflow=LongFlow, h2o=H2o, rkv=Rkv)
