#!/usr/bin/env python3
"""Writes tiny_qwen3/ (a random Qwen3 checkpoint) and tiny_qwen3_golden.safetensors: what transformers makes of it.

Usage: make_tiny_qwen3.py [FOLDER]     (needs torch, transformers, safetensors; CPU, fp32; deterministic)

Golden tensors: `prompt.<i>` [n] i32, `tokens.<i>` [T] i32 greedy continuation, `logits.<i>` [T, V] f32 behind each of
its tokens, teacher-forced over prompt and continuation.
"""
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file

N_PROMPTS, N_TOKENS = 4, 60


def main(folder):
    torch.manual_seed(7)
    torch.set_num_threads(1)
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rope_theta=1e4, rms_norm_eps=1e-6,
        tie_word_embeddings=False, initializer_range=0.3, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    model = transformers.Qwen3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder / "tiny_qwen3")
    (folder / "tiny_qwen3" / "generation_config.json").unlink(missing_ok=True)

    golden = {}
    for i in range(N_PROMPTS):
        prompt = torch.randint(0, config.vocab_size, (1, 5 + 23 * i))
        ids = prompt
        with torch.no_grad():
            for _ in range(N_TOKENS):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            out = model(ids)
        n = prompt.shape[1]
        golden[f"prompt.{i}"] = prompt[0].int()
        golden[f"tokens.{i}"] = ids[0, n:].int()
        golden[f"logits.{i}"] = out.logits[0, n - 1:-1].clone().contiguous()
    save_file(golden, folder / "tiny_qwen3_golden.safetensors", {"transformers": transformers.__version__})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
