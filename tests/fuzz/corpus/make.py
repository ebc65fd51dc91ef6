"""Writes the corpus: small valid files of each kind. Run: python make.py (needs numpy, gguf, safetensors)."""

import json
import pathlib

import gguf
import numpy as np
from safetensors.numpy import save_file

FOLDER = pathlib.Path(__file__).parent


def write_gguf(name, architecture, model, tokens, more):
    writer = gguf.GGUFWriter(FOLDER / "gguf" / name, architecture)
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    more(writer)
    zeros = np.zeros((len(tokens), 32), np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(zeros, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((32, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level(writer):
    writer.add_tokenizer_pre("smollm")
    writer.add_token_merges(["a b"])
    writer.add_token_types([1, 1, 1, 3])


def sentence_piece(writer):
    writer.add_token_scores([0.0, 0.0, -1.0, -2.0, -3.0, -4.0])
    writer.add_token_types([2, 3, 6, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


BYTE_LEVEL = {
    "added_tokens": [{"id": 0, "content": "<|end|>", "special": True, "normalized": False, "rstrip": True},
                     {"id": 7, "content": "<think>", "special": False}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+|\s+(?!\S)|\s+"}, "behavior": "Isolated"},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|end|>"}}, {"Sequence": {"id": "A"}}],
                       "special_tokens": {"<|end|>": {"ids": [0]}}},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "ignore_merges": True, "vocab": {"<|end|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġa": 5, "1": 6},
              "merges": ["a b", ["Ġ", "a"]]},
}
CHARACTERS = {
    "added_tokens": [], "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first", "split": False},
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
    "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True,
              "vocab": {"<unk>": 0, "<0xC3>": 1, "▁": 2, "a": 3, "▁a": 4}, "merges": ["▁ a"]},
}
WORDS = {
    "added_tokens": [{"id": 0, "content": "<|end|>", "special": True}],
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False},
    "model": {"type": "WordLevel", "vocab": {"<|end|>": 0, "a": 1, "b": 2, " ": 3, "\n": 4}, "unk_token": "a"},
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": [1, 2], "tie_word_embeddings": True,
}
ROPES = {
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "attention_factor": 1.1},
    "linear": {"type": "linear", "factor": 2},
}


def main():
    write_gguf("byte_level.gguf", "llama", "gpt2", ["a", "b", "ab", "<|end|>"], byte_level)
    write_gguf("sentence_piece.gguf", "llama", "llama", ["<unk>", "<s>", "<0xC3>", "▁", "a", "▁a"], sentence_piece)
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.float16), "c": np.ones(2, np.int64)}
    save_file(tensors, FOLDER / "safetensors" / "three.safetensors", {"format": "pt"})
    save_file({}, FOLDER / "safetensors" / "none.safetensors")
    for name, document in (("byte_level", BYTE_LEVEL), ("characters", CHARACTERS), ("words", WORDS)):
        (FOLDER / "tokenizer_json" / f"{name}.json").write_text(json.dumps(document))
    for name, rope in ROPES.items():
        (FOLDER / "config_json" / f"{name}.json").write_text(json.dumps({**CONFIG, "rope_scaling": rope}))


main()
