"""Writes types.gguf: one tensor of every supported type with random contents, and next to each the fp32 values that
the gguf package gives for it (NAME.expected). Blocks whose type gguf cannot quantise to (K-quants) are random bytes
under finite scales. Run: python make.py (needs numpy and gguf)."""

import os

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize

ROWS, COLUMNS = 4, 512
# Where a block holds its fp16 scales, for types filled with random bytes.
RANDOM_BLOCKS = {Q.Q4_K: (256, 144, (0, 2)), Q.Q5_K: (256, 176, (0, 2)), Q.Q6_K: (256, 210, (208,))}


def random_blocks(rng, kind):
    elements, size, scales = RANDOM_BLOCKS[kind]
    raw = rng.integers(0, 256, (ROWS, COLUMNS // elements, size), dtype=np.uint8)
    for at in scales:
        half = rng.normal(0, 0.01, raw.shape[:2]).astype(np.float16)
        raw[:, :, at : at + 2] = half[..., None].view(np.uint8)
    return raw.reshape(ROWS, -1)


def main():
    rng = np.random.default_rng(7)
    folder = os.path.dirname(os.path.abspath(__file__))
    writer = gguf.GGUFWriter(os.path.join(folder, "types.gguf"), "llama")
    for kind in (Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q4_K, Q.Q5_K, Q.Q6_K):
        values = (rng.normal(0, 1, (ROWS, COLUMNS)) * 10.0 ** rng.integers(-6, 3, (ROWS, 1))).astype(np.float32)
        data = random_blocks(rng, kind) if kind in RANDOM_BLOCKS else quantize(values, kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        writer.add_tensor(kind.name + ".expected", dequantize(data, kind).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main()
