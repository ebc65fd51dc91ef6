"""The Qwen3 decoder in the few lines that training and closed-loop evaluation share.

Exactly Hugging Face's architecture and parameter names: RMSNorm (eps 1e-6), QK-norm per head before half-split RoPE,
grouped-query attention, SwiGLU, tied embeddings, no biases. Attention itself is passed in by the caller.
Shapes: T tokens (or rows), Hq query heads, H key-value heads, D head dim.
"""
import json
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import vocabulary


@dataclass(frozen=True)
class Config:
    width: int = 256
    layers: int = 6
    q_heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    mlp_width: int = 768
    rope_theta: float = 1e6
    context: int = 8192
    vocab: int = vocabulary.VOCAB_SIZE


NORM_EPS = 1e-6


def rms_norm(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + NORM_EPS)
    return h.to(x.dtype) * weight.to(x.dtype)


def rotate(x, cos, sin):
    """Half-split RoPE in fp32. x [T,heads,D], cos and sin [T,1,D/2]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def linear(x, weight):
    return F.linear(x, weight.to(x.dtype))  # fp32 master weights, activations' type


# Plain functions of tensors, so that one compiled graph of each serves all layers.
def project(x, cos, sin, norm, w_q, w_k, w_v, q_norm, k_norm):
    """x [T,width] -> q [T,Hq,D], k [T,H,D] (both after RoPE), v [T,H,D]."""
    h = rms_norm(x, norm)
    heads = (-1, q_norm.shape[0])
    q = rms_norm(linear(h, w_q).unflatten(-1, heads), q_norm)
    k = rms_norm(linear(h, w_k).unflatten(-1, heads), k_norm)
    return rotate(q, cos, sin), rotate(k, cos, sin), linear(h, w_v).unflatten(-1, heads)


def finish(x, attended, w_o, norm, w_gate, w_up, w_down):
    """Residual around the attention (attended [T,Hq,D]), then the gated MLP."""
    x = x + linear(attended.flatten(-2), w_o)
    h = rms_norm(x, norm)
    return x + linear(F.silu(linear(h, w_gate)) * linear(h, w_up), w_down)


def read_out(x, norm, embedding):
    return linear(rms_norm(x, norm), embedding).float()


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.q_proj = nn.Linear(c.width, c.q_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.q_heads * c.head_dim, c.width, bias=False)
        self.q_norm, self.k_norm = Norm(c.head_dim), Norm(c.head_dim)


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.mlp_width, bias=False)
        self.up_proj = nn.Linear(c.width, c.mlp_width, bias=False)
        self.down_proj = nn.Linear(c.mlp_width, c.width, bias=False)


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), Mlp(c)
        self.input_layernorm, self.post_attention_layernorm = Norm(c.width), Norm(c.width)

    def project_weights(self):
        a = self.self_attn
        return (self.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, a.q_norm.weight,
                a.k_norm.weight)

    def finish_weights(self):
        m = self.mlp
        return (self.self_attn.o_proj.weight, self.post_attention_layernorm.weight, m.gate_proj.weight,
                m.up_proj.weight, m.down_proj.weight)


class Body(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = Norm(c.width)


class Reasoner(nn.Module):
    def __init__(self, config=Config()):
        super().__init__()
        self.config, self.model = config, Body(config)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        c = config
        inverse = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)
        angle = torch.arange(c.context).double()[:, None, None] * inverse
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, tokens, positions, attend, dtype=torch.bfloat16, compiled=None):
        """tokens, positions [T] -> hidden state [T,width]. attend(layer index, q, k, v) -> [T,Hq,D]."""
        p, f = (compiled.project, compiled.finish) if compiled else (project, finish)
        x = self.model.embed_tokens(tokens).to(dtype)
        cos, sin = self.cos[positions], self.sin[positions]
        for i, layer in enumerate(self.model.layers):
            q, k, v = p(x, cos, sin, *layer.project_weights())
            x = f(x, attend(i, q, k, v), *layer.finish_weights())
        return x

    def logits(self, x):
        return read_out(x, self.model.norm.weight, self.model.embed_tokens.weight)


# -------------------------------------------------------------------------------------------------------------- files
def write_config(config, folder):
    c = config
    ids = vocabulary.ID
    hf = dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=c.vocab, hidden_size=c.width,
        intermediate_size=c.mlp_width, num_hidden_layers=c.layers, num_attention_heads=c.q_heads,
        num_key_value_heads=c.kv_heads, head_dim=c.head_dim, hidden_act="silu", max_position_embeddings=c.context,
        rms_norm_eps=NORM_EPS, rope_theta=c.rope_theta, attention_bias=False, attention_dropout=0.0,
        use_sliding_window=False, tie_word_embeddings=True, torch_dtype="bfloat16", bos_token_id=None,
        eos_token_id=ids[vocabulary.END], pad_token_id=ids[vocabulary.PAD])
    generation = dict(do_sample=False, eos_token_id=ids[vocabulary.END], pad_token_id=ids[vocabulary.PAD])
    for name, content in (("config.json", hf), ("generation_config.json", generation)):
        with open(f"{folder}/{name}", "w") as f:
            json.dump(content, f, indent=1)
            f.write("\n")


def save(model, folder, resume=True):
    """model.safetensors in bf16 with configuration and tokenizer; for a later stage also fp32 weights in two files."""
    from safetensors.torch import save_file
    os.makedirs(folder, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file({k: v.bfloat16() for k, v in weights.items()}, f"{folder}/model.safetensors", {"format": "pt"})
    if resume:
        names = sorted(weights)
        for i in range(2):
            save_file({k: weights[k] for k in names[i::2]}, f"{folder}/resume_{i}.safetensors")
    write_config(model.config, folder)
    vocabulary.write_tokenizer(folder)


def load(folder, device, config=Config()):
    """The fp32 resume files when the folder has them, else the bf16 model."""
    from safetensors.torch import load_file
    names = [n for n in sorted(os.listdir(folder)) if n.startswith("resume_")] or ["model.safetensors"]
    weights = {}
    for name in names:
        weights.update(load_file(f"{folder}/{name}"))
    model = Reasoner(config).to(device)
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    return model
