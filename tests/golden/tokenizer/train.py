"""Vocabularies learnt by Hugging Face's trainer, for tests/data/test_bpe_train.c.

    python tests/golden/tokenizer/train.py      (versions: versions.txt; seed below)

Writes train.corpus.txt (documents separated by a form feed) and train.STYLE.json.
"""
import json
import os
import random

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

HERE = os.path.dirname(os.path.abspath(__file__))
SEED, DOCUMENTS, VOCAB = 20, 60, 1100
SPECIALS = ["<|endoftext|>", "<|pad|>"]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SENTENCES = """
The scan keeps one state per head, and the state doesn't grow with the sequence.
We've measured it twice; it's 12.5 times faster, they'll see, I'd say.
Der Wanderer über dem Nebelmeer größte Straße, schöne Grüße aus Köln.
Быстрая лиса прыгает через ленивую собаку, а потом идёт домой.
速い茶色の狐はのろまな犬を飛び越えた。それから家に帰りました。
敏捷的棕色狐狸跳过了那只懒狗,然后回家睡觉。
الثعلب البني السريع يقفز فوق الكلب الكسول
तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर से कूदती है।
빠른 갈색 여우가 게으른 개를 뛰어넘는다.
static int merge(struct pair *p, int n)\t{\n    return p[n].left == p[n + 1].left ? 0 : -1;\n}
for i in range(1000):\n\tprint(f"{i:04d} {x[i]!r}")  # 16 columns
👩‍👩‍👧‍👦 emoji 🏳️‍🌈 and combining e\u0301 a\u0308 marks
aaaa aaaaaaa aaab abab ababab bababa aabbaabb aaaaaaaaaaaaaaaa
http://example.org/a/b?c=d&e=%20f#g 2026-11-23T09:41:00Z 3.14159265
""".strip().split("\n")


def corpus():
    rng = random.Random(SEED)
    sentences = [s.encode().decode("unicode_escape").encode("latin-1").decode()
                 if "\\" in s and s.isascii() else s for s in SENTENCES]
    documents = []
    for _ in range(DOCUMENTS):
        parts = []
        for _ in range(rng.randint(1, 12)):
            words = rng.choice(sentences).split(" ")
            rng.shuffle(words)
            parts.append(rng.choice([" ", " ", "  ", "\n"]).join(words[:rng.randint(1, len(words))]))
        documents.append(rng.choice(["\n", "\n\n", " "]).join(parts))
    return documents


def main():
    documents = corpus()
    with open(os.path.join(HERE, "train.corpus.txt"), "w", encoding="utf-8", newline="") as f:
        f.write("\f".join(documents))
    for style in ("gpt2", "llama3"):
        t = Tokenizer(models.BPE())
        if style == "gpt2":
            t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            t.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        t.train_from_iterator(documents, trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=SPECIALS, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        model = json.loads(t.to_str())["model"]
        with open(os.path.join(HERE, f"train.{style}.json"), "w", encoding="utf-8") as f:
            json.dump({"vocab": model["vocab"], "merges": model["merges"]}, f, ensure_ascii=False,
                      separators=(",", ":"))
            f.write("\n")


main()
