"""Characters as tokens: ids, text to ids and back, tokenizer.json.

96 ids: four special tokens, the newline, then the printable ASCII characters except ` \\ < and >.
"""
import json

import numpy as np

PAD, END, THINK, END_THINK = "<|pad|>", "<|end|>", "<think>", "</think>"
SPECIAL = (PAD, END, THINK, END_THINK)
CHARACTERS = "\n" + "".join(chr(i) for i in range(32, 127) if chr(i) not in "`\\<>")
TOKENS = SPECIAL + tuple(CHARACTERS)
ID = {token: i for i, token in enumerate(TOKENS)}
VOCAB_SIZE = len(TOKENS)
assert VOCAB_SIZE == 96

# Bytes 128 + id stand for the special tokens while a text becomes ids.
_BYTE_TO_ID = bytearray(ID.get(chr(i), ID[PAD]) for i in range(256))
for _token in SPECIAL:
    _BYTE_TO_ID[128 + ID[_token]] = ID[_token]


def encode(text):
    """ids (uint8) of a text of this vocabulary."""
    for token in SPECIAL:
        text = text.replace(token, chr(128 + ID[token]))
    return np.frombuffer(text.encode("latin-1").translate(_BYTE_TO_ID), np.uint8)


def decode(ids):
    return "".join(TOKENS[i] for i in ids)


def tokenizer_json():
    """WordLevel over single characters; the special tokens are matched first. A character without an id is an error."""
    added = [dict(id=ID[t], content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
             for t in SPECIAL]
    return dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
        pre_tokenizer=dict(type="Split", pattern=dict(Regex="[\\s\\S]"), behavior="Isolated", invert=False),
        post_processor=None, decoder=dict(type="Fuse"),
        model=dict(type="WordLevel", vocab=ID, unk_token="<|unknown|>"))


def write_tokenizer(folder):
    with open(f"{folder}/tokenizer.json", "w") as f:
        json.dump(tokenizer_json(), f, indent=1)
        f.write("\n")
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=END, pad_token=PAD,
                  clean_up_tokenization_spaces=False, model_max_length=8192)
    with open(f"{folder}/tokenizer_config.json", "w") as f:
        json.dump(config, f, indent=1)
        f.write("\n")
