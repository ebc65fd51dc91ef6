#!/usr/bin/env python3
"""Writes tiny random checkpoints and what transformers makes of them: one per architecture, RoPE scaling and storage type.

NAME/ (Hugging Face folders, bf16 but for one in fp32 and one in fp16; `sharded` has an index) and NAME.gguf (one per
architecture, scaling and GGUF type). golden.safetensors: `NAME.ids` [T] i32 and `NAME.logits` [8, V] f32 behind the last
eight tokens, from transformers in fp32 on the dequantised weights.

Run: python make.py       (needs torch, transformers, safetensors, gguf; CPU; deterministic)
"""
import pathlib

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent
VOCABULARY, TOKENS, SHOWN = 64, 40, 8
ROPES = {
    "none": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=4.0),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
}
KINDS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
# Blocks of 256 that the gguf package cannot quantise to: random bytes under finite scales.
RANDOM_BLOCKS = {Q.Q4_K: (144, (0, 2)), Q.Q5_K: (176, (0, 2)), Q.Q6_K: (210, (208,))}


def make_model(kind, rope, tied, width=32, ffn=64, layers=2, heads=4, kv_heads=2, head_dim=16):
    config_class, model_class = KINDS[kind]
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=128,
        rope_parameters=dict(rope_theta=1e4, **ROPES[rope]), rms_norm_eps=1e-5, tie_word_embeddings=tied,
        initializer_range=0.25, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.2 * torch.randn_like(parameter)
        elif name.endswith("bias"):
            parameter.data = 0.5 * torch.randn_like(parameter)
    return model


def golden_of(model, name, golden):
    ids = torch.randint(0, VOCABULARY, (1, TOKENS))
    with torch.no_grad():
        logits = model(ids).logits[0, -SHOWN:]
    golden[f"{name}.ids"] = ids[0].int()
    golden[f"{name}.logits"] = logits.clone().contiguous()


def write_folder(name, kind, rope, tied, golden, dtype=torch.bfloat16, shard=None):
    model = make_model(kind, rope, tied)
    for parameter in model.parameters():  # not model.to(): it would round the rotary frequencies as well
        parameter.data = parameter.data.to(dtype).float()
    golden_of(model, name, golden)
    folder = FOLDER / name
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)


def interleaved(weight, heads):
    """Rows of q or k as GGUF orders them in llama files: pairs (i, i + D/2) side by side."""
    dim = weight.shape[0] // heads
    return weight.reshape(heads, 2, dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def random_blocks(rng, kind, rows, columns):
    size, scales = RANDOM_BLOCKS[kind]
    raw = rng.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
    for at in scales:
        half = np.abs(rng.normal(0, 1, raw.shape[:2])).astype(np.float16) * np.float16(4e-4)
        raw[:, :, at : at + 2] = half[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    for ours, theirs in GGUF_NAMES.items():
        if rest.startswith(ours):
            return f"blk.{layer}.{theirs}{rest[len(ours):]}"
    raise KeyError(name)


def write_gguf(name, kind, rope, golden, storage=Q.F32, **sizes):
    rng = np.random.default_rng(len(name))
    model = make_model(kind, rope, tied=storage == Q.F16, **sizes)
    config = model.config
    writer = gguf.GGUFWriter(FOLDER / (name + ".gguf"), kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(config.head_dim)
    if rope in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope))
        writer.add_rope_scaling_factor(ROPES[rope]["factor"])
        if rope == "yarn":
            writer.add_rope_scaling_orig_ctx_len(ROPES[rope]["original_max_position_embeddings"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(ord("0") + i) for i in range(VOCABULARY - 1)] + ["01"])
    writer.add_token_merges(["0 1"])
    if rope == "llama3":  # converters store the scaling's result as divisors
        plain = 1e4 ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))

    state = model.state_dict()
    for key, value in state.items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = value.float().numpy()
        heads = config.num_attention_heads if ".q_proj" in key else config.num_key_value_heads
        permuted = kind == "llama" and (".q_proj" in key or ".k_proj" in key)
        if permuted:
            values = interleaved(values, heads)
        one = storage if values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[storage][0] == 0 else Q.F32
        data = random_blocks(rng, one, *values.shape) if one in RANDOM_BLOCKS else quantize(values, one)
        writer.add_tensor(gguf_name(key), data, raw_dtype=one)
        values = dequantize(data, one).astype(np.float32).reshape(values.shape)
        if permuted:
            dim = values.shape[0] // heads
            values = values.reshape(heads, dim // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        value.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    golden_of(model, name, golden)


def main():
    torch.manual_seed(3)
    torch.set_num_threads(1)
    golden = {}
    write_folder("llama_none", "llama", "none", True, golden, dtype=torch.float32)
    write_folder("llama_linear", "llama", "linear", False, golden, dtype=torch.float16)
    write_folder("llama_llama3", "llama", "llama3", True, golden)
    write_folder("llama_yarn", "llama", "yarn", True, golden)
    write_folder("qwen2_none", "qwen2", "none", True, golden)
    write_folder("qwen2_sharded_yarn", "qwen2", "yarn", False, golden, shard="24KB")
    write_folder("qwen3_yarn", "qwen3", "yarn", True, golden)
    for kind in KINDS:
        write_gguf(f"gguf_{kind}", kind, "none", golden, Q.F16)
    for rope in ("linear", "llama3", "yarn"):
        write_gguf(f"gguf_llama_{rope}", "llama", rope, golden, Q.Q8_0)
    for storage in (Q.F32, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1):
        write_gguf(f"gguf_{storage.name.lower()}", "llama", "none", golden, storage)
    for storage in RANDOM_BLOCKS:
        write_gguf(f"gguf_{storage.name.lower()}", "llama", "none", golden, storage, width=256, ffn=256, layers=1, heads=2,
                   kv_heads=1)
    save_file(golden, FOLDER / "golden.safetensors", {"transformers": transformers.__version__})


if __name__ == "__main__":
    main()
