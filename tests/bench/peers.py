"""Times attention-only peers on the current GPU as the attention bench times the fused step: CUDA-graph replays over
as many K/V buffers as L2 cannot hold, medians. Peers: torch's scaled_dot_product_attention, flash and cuDNN, with
the query group folded into the query length; FlashInfer's batch decode over pages of 64 slots when it can be imported:
on tensor cores, on CUDA cores, and its XQA kernel, each timed only where its output agrees with torch's.

Usage: peers.py OUTPUT.jsonl [dtype ...]
Environment: KVLAPSE_PEER_PATH, a folder searched before all others for the packages of peers (a FlashInfer unpacked
beside the bench, say). All FlashInfer peers together begin nothing after 40 seconds: what it compiles at first use
counts, so compile ahead or run twice.
"""

import json
import os
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

N_Q_HEADS, N_KV_HEADS, HEAD_DIM = 32, 8, 128
ROTATION_BYTES = 1 << 30
SHAPES = [(1, 1024), (1, 3276), (1, 16384), (8, 1024), (8, 3276), (8, 16384), (16, 3276), (32, 1024), (32, 3276),
          (32, 16384), (64, 1024), (128, 1024), (128, 3276)]
FLASHINFER_SECONDS, FLASHINFER_PAGE, FLASHINFER_TOLERANCE = 40, 64, 5e-3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SDPA = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}


def replay_times(calls, seconds=0.02):
    """Microseconds per call: the graph of all calls is replayed and timed as a whole."""
    torch.cuda.synchronize()  # inputs and plans come from another stream
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


def import_flashinfer():
    if os.environ.get("KVLAPSE_PEER_PATH"):
        sys.path.insert(0, os.environ["KVLAPSE_PEER_PATH"])
    try:
        import flashinfer
        import flashinfer.decode
    except Exception as error:  # half an installation fails in many ways
        print("flashinfer left out, cannot be imported:", first_line(error))
        return None
    print("flashinfer", flashinfer.__version__)
    return flashinfer


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


class FlashInferPeers:
    """One shape: pages and planned wrappers; each peer answers its calls, one a slab."""

    def __init__(self, flashinfer, batch, slots, dtype, slabs):
        self.flashinfer, self.batch, self.slots, self.dtype = flashinfer, batch, slots, dtype
        self.n_pages = -(-slots // FLASHINFER_PAGE)
        shape = (batch * self.n_pages, N_KV_HEADS, FLASHINFER_PAGE, HEAD_DIM)
        self.q = torch.randn(batch, N_Q_HEADS, HEAD_DIM, dtype=dtype, device="cuda")
        self.caches = [(torch.randn(shape, dtype=dtype, device="cuda"), torch.randn(shape, dtype=dtype, device="cuda"))
                       for _ in range(slabs)]
        self.pages = torch.arange(batch * self.n_pages, dtype=torch.int32, device="cuda")
        k, v = (x.view(batch, self.n_pages, N_KV_HEADS, FLASHINFER_PAGE, HEAD_DIM).transpose(1, 2)
                .reshape(batch, N_KV_HEADS, -1, HEAD_DIM)[:, :, :slots] for x in self.caches[0])
        q = self.q.view(batch, N_KV_HEADS, N_Q_HEADS // N_KV_HEADS, HEAD_DIM)
        self.expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).view_as(self.q)

    def peers(self):
        return {"flashinfer_tensor": lambda: self.batch_decode(True),
                "flashinfer_cuda": lambda: self.batch_decode(False),
                "flashinfer_xqa": self.xqa}

    def checked(self, call, out):
        calls = [lambda cache=cache: call(cache) for cache in self.caches]
        calls[0]()
        difference = (out - self.expected).abs().max().item()
        if not difference < FLASHINFER_TOLERANCE:
            raise RuntimeError(f"output is off by {difference:.3g}")
        return calls

    def batch_decode(self, tensor_cores):
        wrapper = self.flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"), "HND", use_tensor_cores=tensor_cores)
        indptr = torch.arange(self.batch + 1, dtype=torch.int32, device="cuda") * self.n_pages
        last = torch.full((self.batch,), (self.slots - 1) % FLASHINFER_PAGE + 1, dtype=torch.int32, device="cuda")
        # The plan stays out of the graph; the lengths that it was made for never change.
        wrapper.plan(indptr, self.pages, last, N_Q_HEADS, N_KV_HEADS, HEAD_DIM, FLASHINFER_PAGE,
                     q_data_type=self.dtype, kv_data_type=self.dtype)
        out = torch.empty_like(self.q)
        return self.checked(lambda cache: wrapper.run(self.q, cache, out=out), out)

    def xqa(self):
        workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
        table = self.pages.view(self.batch, self.n_pages)
        lengths = torch.full((self.batch,), self.slots, dtype=torch.int32, device="cuda")
        out = torch.empty_like(self.q)
        return self.checked(lambda cache: self.flashinfer.decode.xqa_batch_decode_with_kv_cache(
            self.q, cache, workspace, table, lengths, self.n_pages * FLASHINFER_PAGE, bmm1_scale=HEAD_DIM**-0.5,
            bmm2_scale=1.0, kv_layout="HND", out=out), out)


def main():
    out = open(sys.argv[1], "w")
    names = sys.argv[2:] or list(DTYPES)
    print("torch", torch.__version__, torch.cuda.get_device_name())
    flashinfer, flashinfer_seconds, failed = import_flashinfer(), 0.0, set()

    def time_peer(peer, calls):
        us = replay_times(calls())
        row = {"bench": "attention_peer", "peer": peer, "device": torch.cuda.get_device_name(), "dtype": name,
               "batch": batch, "slots": slots, "kv_bytes": kv_bytes, "median_us": us[len(us) // 2],
               "min_us": us[0], "max_us": us[-1], "runs": len(us)}
        out.write(json.dumps(row) + "\n")
        out.flush()

    for name in names:
        dtype = DTYPES[name]
        for batch, slots in SHAPES:
            kv_bytes = 2 * batch * N_KV_HEADS * slots * HEAD_DIM * 2
            slabs = max(4, -(-ROTATION_BYTES // kv_bytes))
            shape = (batch, N_KV_HEADS, slots, HEAD_DIM)
            q = torch.randn(batch, N_KV_HEADS, N_Q_HEADS // N_KV_HEADS, HEAD_DIM, dtype=dtype, device="cuda")
            kv = [(torch.randn(shape, dtype=dtype, device="cuda"), torch.randn(shape, dtype=dtype, device="cuda"))
                  for _ in range(slabs)]
            for peer, backend in SDPA.items():
                try:
                    time_peer(peer, lambda: [sdpa_call(backend, q, k, v) for k, v in kv])
                except RuntimeError as error:
                    print(peer, name, batch, slots, first_line(error))
            del kv
            torch.cuda.empty_cache()
            if flashinfer is None:
                continue
            if flashinfer_seconds > FLASHINFER_SECONDS:
                print(f"flashinfer left out from {name} {batch} {slots} on: its {FLASHINFER_SECONDS} s are spent")
                flashinfer = None
                continue
            started = time.monotonic()
            shape_peers = FlashInferPeers(flashinfer, batch, slots, dtype, slabs)
            for peer, calls in shape_peers.peers().items():
                if (peer, name) in failed:
                    continue
                try:
                    time_peer(peer, calls)
                except Exception as error:  # whatever another project raises, the other peers are timed
                    print(peer, name, batch, slots, "left out from here on:", first_line(error))
                    failed.add((peer, name))
            del shape_peers, calls
            torch.cuda.empty_cache()
            flashinfer_seconds += time.monotonic() - started
    print(f"peers done, flashinfer {flashinfer_seconds:.0f} s")


if __name__ == "__main__":
    main()
