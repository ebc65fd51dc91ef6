"""Writes small tokenizers with the pre-tokenizers of the families that we read (FAMILY.json) and golden.json: strings
and the ids that the `tokenizers` library gives each, with special tokens parsed and as plain text.
Run: python make.py (needs tokenizers)."""

import json
import os
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLIT = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "They're sure it's fine; I'm not. We'll see what you've done, and she'd say DON'T and IT'S.\n\n",
    "In 2024 there were 12345 entries, 67 of 890 had 1234567 items.   Two spaces  here,\ttabs\tthere.\r\n",
    "The cache keeps keys and values of every token; the policy evicts what attention does not read.\n",
    "résumé naïve café — “quoted” … 東京 한국 Ελλάδα привет мир\n",
] * 8
PIECES = ["'s", "'RE", "'\u017f", " ", "  ", "\n", "\r\n", "\t", "a", "Ab", "é", "e\u0301", "½", "Ⅷ", "٣", "12", "3456", "!",
          "...", "—", "東京", "🙂", "\u200d", "\u00a0", "\u2003", "\u180e", "\u3000", "<|end|>", "<think>", "<|user|>", "\x04",
          "\u0085", "\u2028", "_", "don't", "ﬁ", "\u212b", "\u1112\u1161\u11ab", "\u1c89", "\U00011f50", "\U00016ff4", "the cache"]


def byte_level(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def families():
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    return {
        "gpt2": (plain, None),
        "smollm": (digits, None),
        "qwen2": (byte_level(SPLIT % ""), normalizers.NFC()),
        "llama3": (byte_level(SPLIT % "{1,3}"), None),
    }


def train(pre_tokenizer, normalizer, ignore_merges):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|end|>", "<|user|>"], initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def main():
    folder = os.path.dirname(os.path.abspath(__file__))
    rng = random.Random(11)
    strings = ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, 12))) for _ in range(150)] + CORPUS[:4] + [""]
    golden = {"strings": strings}
    for name, (pre_tokenizer, normalizer) in families().items():
        tokenizer = train(pre_tokenizer, normalizer, name == "llama3")
        tokenizer.save(os.path.join(folder, name + ".json"), pretty=False)
        ids = [tokenizer.encode(s).ids for s in strings]
        tokenizer.encode_special_tokens = True
        golden[name] = {"ids": ids, "plain": [tokenizer.encode(s).ids for s in strings]}
    with open(os.path.join(folder, "golden.json"), "w") as file:
        json.dump(golden, file, separators=(",", ":"))


main()
