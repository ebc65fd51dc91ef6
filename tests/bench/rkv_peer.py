"""Times what R-KV's own code does at one compaction (one layer, one sequence, bf16) in torch: max over the group of the
window's logits, softmax, max pool, the whole matrix of cosines with one entry a row forgiven, top-k, gather. Written
from the published algorithm; with and without CUDA graphs.

Usage: rkv_peer.py OUTPUT.jsonl
"""

import json
import sys

import torch
import torch.nn.functional as F

N_Q_HEADS, N_KV_HEADS, HEAD_DIM, WINDOW, KERNEL, LAMBDA, THRESHOLD = 32, 8, 128, 8, 7, 0.07, 0.5


def compact(q, k, v, budget):
    group, n = N_Q_HEADS // N_KV_HEADS, k.shape[2]
    grouped = q.view(1, N_KV_HEADS, group, WINDOW, HEAD_DIM)
    logits = torch.matmul(grouped, k.unsqueeze(2).transpose(-1, -2)).amax(2) / HEAD_DIM**0.5
    votes = F.softmax(logits[..., :-WINDOW], dim=-1, dtype=torch.float32).mean(-2).to(q.dtype)
    importance = F.max_pool1d(votes, KERNEL, 1, KERNEL // 2)
    unit = k[0] / (k[0].norm(dim=-1, keepdim=True) + 1e-8)
    cosine = torch.matmul(unit, unit.transpose(-1, -2))
    index = torch.arange(n, device=k.device)
    cosine.diagonal(dim1=1, dim2=2).zero_()
    last = torch.where(cosine > THRESHOLD, index.view(1, 1, n), index.new_zeros(())).amax(-1, keepdim=True)
    cosine.scatter_(-1, last, 0)
    redundancy = cosine.mean(1).softmax(-1)[:, :-WINDOW].unsqueeze(0)
    score = LAMBDA * importance - (1 - LAMBDA) * redundancy
    keep = score.topk(budget - WINDOW, dim=-1).indices.unsqueeze(-1).expand(-1, -1, -1, HEAD_DIM)
    return tuple(torch.cat([x[:, :, :-WINDOW].gather(2, keep), x[:, :, -WINDOW:]], 2) for x in (k, v))


def median_us(call, runs=20):
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(runs):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return sorted(times)[len(times) // 2]


def main():
    with open(sys.argv[1], "w") as out:
        for budget in (1024, 2048, 3276):
            n = budget + 128
            q = torch.randn(1, N_Q_HEADS, WINDOW, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            k = torch.randn(1, N_KV_HEADS, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            v = torch.randn_like(k)
            eager = median_us(lambda: compact(q, k, v, budget))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                compact(q, k, v, budget)
            row = {"bench": "rkv_peer", "device": torch.cuda.get_device_name(), "batch": 1, "budget_slots": budget,
                   "slots": n, "eager_us": eager, "graph_us": median_us(graph.replay)}
            print(row)
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
