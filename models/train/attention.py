"""Attention over packed documents for training: plain, and with keys that vanish (the second stage).

q [T,Hq,D], k and v [T,H,D]; a token sees its own document up to itself.
"""
import math

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


def plain(batch):
    """attend(layer, q, k, v) without eviction: FlashAttention over variable lengths on CUDA, a loop elsewhere."""
    def on_cuda(_, q, k, v):
        return torch.ops.aten._flash_attention_forward(q, k, v, batch.bounds, batch.bounds, batch.longest,
                                                       batch.longest, 0.0, True, False)[0]

    def by_document(_, q, k, v):
        out = torch.zeros_like(q)
        bounds = batch.bounds.tolist()
        for a, b in zip(bounds, bounds[1:]):
            if b > a:
                qkv = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
                out[a:b] = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        return out

    return on_cuda if batch.tokens.is_cuda else by_document


def log_uniform(low, high, count, device):
    return torch.exp(torch.empty(count, device=device).uniform_(math.log(low), math.log(high)))


def key_lives(batch, layers, kv_heads, vocab):
    """Age at which each key vanishes, i32 [layers, H, T].

    Eviction under a fixed budget looks, from a key's point of view, like a life of random length: nothing happens while
    it is in the protected recent span, then it goes at a constant rate. Per document: one in five keeps everything,
    about half keep the prompt and lose the rest, a third may lose anything; and who shares the draw is drawn as well
    (all layers, the heads of a layer, or nobody), since policies differ in that. A factor per layer and character
    stands for policies that prefer kinds of characters. A model trained without this leans on the think tag and on old
    steps as attention sinks, and fails at the first eviction even of tokens that carry nothing.
    """
    device, t = batch.tokens.device, len(batch.tokens)
    n = len(batch.bounds) - 1
    document = document_of(batch)
    length = (batch.bounds[1:] - batch.bounds[:-1]).clamp(min=BLOCK).float()
    kind = torch.rand(n, device=device)
    keep_all, lose_any = kind < 0.2, kind > 0.65
    mean_life = length * torch.where(lose_any, log_uniform(0.7, 4, n, device), log_uniform(0.15, 2, n, device))
    protected = log_uniform(4, 128, n, device)

    sharing = torch.rand(n, device=device)[document]
    draw = -torch.log(torch.rand(layers, kv_heads, t, device=device).clamp_min(1e-9))
    draw = torch.where(sharing < 0.75, draw[:, :1], draw)
    draw = torch.where(sharing < 0.25, draw[:1], draw)
    taste = torch.exp(0.7 * torch.randn(layers, 1, vocab, device=device))[..., batch.tokens]
    life = protected[document] + mean_life[document] * draw * taste
    forever = keep_all[document] | (batch.in_prompt & ~lose_any[document])
    return torch.where(forever, 1e6, life.clamp(max=1e6)).int()


def document_of(batch):
    at = torch.arange(len(batch.tokens), device=batch.tokens.device, dtype=torch.int32)
    return (torch.searchsorted(batch.bounds, at, right=True) - 1).clamp_(max=len(batch.bounds) - 2)


def vanishing(batch, config, flex=flex_attention):
    """attend(layer, q, k, v) where key j is gone for a query lives[layer, head, j] or more tokens younger."""
    lives = key_lives(batch, config.layers, config.kv_heads, config.vocab)
    document = document_of(batch).int()
    group = config.q_heads // config.kv_heads

    def visible(life):
        def mask(_, head, i, j):
            return (document[i] == document[j]) & (i >= j) & (i - j < life[head // group, j])
        return mask

    rules = [visible(lives[layer].contiguous()) for layer in range(config.layers)]
    if not batch.tokens.is_cuda:
        return dense(rules, config.q_heads, len(batch.tokens))

    # Only blocks from the start of a query block's first document up to the diagonal are looked at.
    blocks = torch.arange(len(batch.tokens) // BLOCK, device=batch.tokens.device)
    first = batch.bounds[document[::BLOCK].long()].long() // BLOCK
    count = (blocks - first + 1).int()
    index = torch.where(blocks[None] < count[:, None], first[:, None] + blocks[None], 0).int()
    masks = [BlockMask.from_kv_blocks(count[None, None], index[None, None].contiguous(), BLOCK_SIZE=BLOCK,
                                      mask_mod=rule) for rule in rules]

    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return flex(q, k, v, block_mask=masks[layer], enable_gqa=True)[0].transpose(0, 1)

    return attend


def dense(rules, heads, tokens):
    """The same over whole score matrices, for small tests where FlexAttention has no backward pass."""
    head = torch.arange(heads)[:, None, None]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)

    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        mask = rules[layer](0, head, i, j)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], enable_gqa=True)[0].transpose(0, 1)

    return attend
