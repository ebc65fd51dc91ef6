"""Times attention-only peers on the current GPU as the attention bench times the fused step: CUDA-graph replays over
as many K/V buffers as L2 cannot hold, medians. Peers: torch's scaled_dot_product_attention, flash and cuDNN, with
the query group folded into the query length; FlashInfer's batch decode when it is installed.

Usage: peers.py OUTPUT.jsonl [dtype ...]
"""

import json
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

N_Q_HEADS, N_KV_HEADS, HEAD_DIM = 32, 8, 128
ROTATION_BYTES = 1 << 30
SHAPES = [(1, 1024), (1, 3276), (1, 16384), (8, 1024), (8, 3276), (8, 16384), (16, 3276), (32, 1024), (32, 3276),
          (32, 16384), (64, 1024), (128, 1024), (128, 3276)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def replay_times(calls, seconds=0.02):
    """Microseconds per call: the graph of all calls is replayed and timed as a whole."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()  # plans and workspaces stay out of the graph
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        stream.synchronize()
        times, total = [], 0.0
        while len(times) < 7 or (total < seconds * 1e6 and len(times) < 40):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            stop.record(stream)
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e3)
            total += times[-1]
    return sorted(t / len(calls) for t in times)


def sdpa_call(backend, q, k, v):
    def call():
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return call


def flashinfer_calls(batch, slots, dtype, slabs):
    import flashinfer  # measured only when present

    page = 64
    n_pages = -(-slots // page)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "HND", use_tensor_cores=True)
    indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * n_pages
    wrapper.plan(indptr, torch.arange(batch * n_pages, dtype=torch.int32, device="cuda"),
                 torch.full((batch,), (slots - 1) % page + 1, dtype=torch.int32, device="cuda"), N_Q_HEADS, N_KV_HEADS,
                 HEAD_DIM, page, q_data_type=dtype, kv_data_type=dtype)
    q = torch.randn(batch, N_Q_HEADS, HEAD_DIM, dtype=dtype, device="cuda")
    caches = [torch.randn(batch * n_pages, 2, N_KV_HEADS, page, HEAD_DIM, dtype=dtype, device="cuda")
              for _ in range(slabs)]
    return [lambda cache=cache: wrapper.run(q, cache) for cache in caches]


def main():
    out = open(sys.argv[1], "w")
    names = sys.argv[2:] or list(DTYPES)
    print("torch", torch.__version__, torch.cuda.get_device_name())
    for name in names:
        dtype = DTYPES[name]
        for batch, slots in SHAPES:
            kv_bytes = 2 * batch * N_KV_HEADS * slots * HEAD_DIM * 2
            slabs = max(4, -(-ROTATION_BYTES // kv_bytes))
            shape = (batch, N_KV_HEADS, slots, HEAD_DIM)
            q = torch.randn(batch, N_KV_HEADS, N_Q_HEADS // N_KV_HEADS, HEAD_DIM, dtype=dtype, device="cuda")
            kv = [(torch.randn(shape, dtype=dtype, device="cuda"), torch.randn(shape, dtype=dtype, device="cuda"))
                  for _ in range(slabs)]
            peers = {
                "sdpa_flash": lambda: [sdpa_call(SDPBackend.FLASH_ATTENTION, q, k, v) for k, v in kv],
                "sdpa_cudnn": lambda: [sdpa_call(SDPBackend.CUDNN_ATTENTION, q, k, v) for k, v in kv],
                "flashinfer": lambda: flashinfer_calls(batch, slots, dtype, slabs),
            }
            for peer, calls in peers.items():
                try:
                    us = replay_times(calls())
                except (ImportError, RuntimeError) as error:
                    print(peer, name, batch, slots, str(error).splitlines()[0][:160])
                    continue
                row = {"bench": "attention_peer", "peer": peer, "device": torch.cuda.get_device_name(), "dtype": name,
                       "batch": batch, "slots": slots, "kv_bytes": kv_bytes, "median_us": us[len(us) // 2],
                       "min_us": us[0], "max_us": us[-1], "runs": len(us)}
                out.write(json.dumps(row) + "\n")
                out.flush()
            del kv
            torch.cuda.empty_cache()
    print("peers done")


if __name__ == "__main__":
    main()
