"""Attention of one new token over the living positions of its row, with the attention weights as a second result.

q [B,Hq,D], k and v [B,H,N,D], alive [B,H,N] bool, n positions used -> output [B,Hq,D], weights [B,Hq,n] fp32 for the
rows from `first_row` on (dead positions: 0).
"""
import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def with_torch(q, k, v, alive, n, first_row=0):
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("bhgd,bhnd->bhgn", q.unflatten(1, (-1, group)).float(), k[:, :, :n].float())
    logits = (logits * q.shape[-1] ** -0.5).masked_fill(~alive[:, :, None, :n], -torch.inf)
    p = logits.softmax(-1)
    out = torch.einsum("bhgn,bhnd->bhgd", p, v[:, :, :n].float()).flatten(1, 2)
    return out.to(q.dtype), p.flatten(1, 2)[first_row:]


if triton is not None:
    @triton.jit(do_not_specialize=["n", "N", "first_row"])
    def decode_kernel(q_ptr, k_ptr, v_ptr, alive_ptr, logit_ptr, out_ptr, lse_ptr, n, N, first_row, scale,
                      H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                      PRECISION: tl.constexpr):
        """One program per (row, kv head): online softmax over blocks of positions; raw logits go to memory."""
        program = tl.program_id(0)
        row = program // H
        head = tl.arange(0, 16)  # the group's query heads, padded to what tl.dot takes
        d = tl.arange(0, D)
        real = head < G
        q_at = (program * G + head)[:, None] * D + d[None, :]
        q = tl.load(q_ptr + q_at, mask=real[:, None], other=0.0)
        base = program.to(tl.int64) * N
        stored = (program.to(tl.int64) - first_row * H) * G * N
        top = tl.full([16], -1e30, tl.float32)
        total = tl.zeros([16], tl.float32)
        acc = tl.zeros([16, D], tl.float32)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            here = (base + at)[:, None] * D + d[None, :]
            k = tl.load(k_ptr + here, mask=inside[:, None], other=0.0)
            living = tl.load(alive_ptr + base + at, mask=inside, other=0) != 0
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            s = tl.where(living[None, :], s, -1e30)
            if row >= first_row:
                tl.store(logit_ptr + stored + head[:, None] * N + at[None, :], s,
                         mask=real[:, None] & inside[None, :])
            new_top = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp(top - new_top)
            p = tl.where(living[None, :], tl.exp(s - new_top[:, None]), 0.0)
            v = tl.load(v_ptr + here, mask=inside[:, None], other=0.0)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            total = total * shrink + tl.sum(p, 1)
            top = new_top
        tl.store(out_ptr + q_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None])
        tl.store(lse_ptr + program * G + head, top + tl.log(total), mask=real)


class WithTriton:
    """Keeps its buffer for the logits between calls."""

    def __init__(self):
        self.logits = None

    def __call__(self, q, k, v, alive, n, first_row=0):
        b, h, positions, d = k.shape
        group = q.shape[1] // h
        wanted = (b - first_row, q.shape[1], positions)
        if self.logits is None or self.logits.shape != wanted:
            self.logits = torch.empty(wanted, device=q.device, dtype=torch.float32)
        q = q.contiguous()
        out, lse = torch.empty_like(q), torch.empty(b, q.shape[1], device=q.device, dtype=torch.float32)
        decode_kernel[(b * h,)](q, k, v, alive.view(torch.uint8), self.logits, out, lse, n, positions, first_row,
                                d ** -0.5, H=h, G=group, D=d, BLOCK=64,
                                PRECISION="ieee" if q.dtype == torch.float32 else "tf32")
        return out, (self.logits[:, :, :n] - lse[first_row:, :, None]).exp_()


def difference_to_torch(device, dtype):
    """Largest difference between the two on random input; the caller decides whether it is small enough."""
    b, h, positions, n, d = 6, 4, 200, 150, 64
    q = torch.randn(b, 2 * h, d, device=device, dtype=dtype)
    k, v = (torch.randn(b, h, positions, d, device=device, dtype=dtype) for _ in range(2))
    alive = torch.rand(b, h, positions, device=device) < 0.7
    got, want = WithTriton()(q, k, v, alive, n, 2), with_torch(q, k, v, alive, n, 2)
    return max((x.float() - y.float()).abs().max().item() for x, y in zip(got, want))
