"""Words that Hugging Face's Split cuts from characters of all scripts, for tests/data/test_pretokenize.c.

    python tests/golden/tokenizer/words.py      (versions: versions.txt; seed below)
"""
import json
import os
import random

from tokenizers import Regex, pre_tokenizers

HERE = os.path.dirname(os.path.abspath(__file__))
SEED = 21
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "marks": r"[^\P{M}\x{0301}]+|[\p{Lu}\p{Lt}]?[\p{Ll}\p{Lm}\p{Lo}]+|\p{Nd}|\p{P}+|\P{S}",
}
ODD = [0x20, 0x0A, 0x0D, 0x09, 0xA0, 0x85, 0x2028, 0x3000, 0x180E, 0x200D, 0xFEFF, 0x301, 0x17F, 0x212A]
# letters, digits and marks newer than Unicode 14
NEW = [0x897, 0x1C89, 0xA7CB, 0x105C0, 0x10D40, 0x10D4A, 0x10EC2, 0x11240, 0x11380, 0x11BF0, 0x11F02,
       0x11F50, 0x13460, 0x143FA, 0x16D70, 0x1CCF0, 0x1E030, 0x1E4F9, 0x2EBF0, 0x2EE5D, 0x31350, 0x323AF]


def text():
    rng = random.Random(SEED)
    out = []
    for _ in range(9000):
        r = rng.random()
        if r < .3:
            out.append(chr(rng.randrange(0x20, 0x7F)))
        elif r < .55:
            out.append(chr(rng.choice(ODD)))
        elif r < .65:
            out.append(rng.choice(["'s", "'D", "'ll", "'RE", "12345", "word", "  "]))
        elif r < .75:
            out.append(chr(rng.choice(NEW)) + rng.choice(["'d", "a", "1", " "]))
        else:
            c = rng.randrange(0x80, rng.choice([0x800, 0x3000, 0xD800, 0x32000]))
            out.append(chr(c if not 0xD800 <= c < 0xE000 else 0x4E00))
    return "".join(out)


def main():
    s = text()
    words = {}
    for name, pattern in PATTERNS.items():
        pieces = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(s)
        assert "".join(p for p, _ in pieces) == s
        words[name] = {"pattern": pattern, "bytes": [len(p.encode()) for p, _ in pieces]}
    with open(os.path.join(HERE, "words.json"), "w", encoding="utf-8") as f:
        json.dump({"text": s, "words": words}, f, separators=(",", ":"))
        f.write("\n")


main()
