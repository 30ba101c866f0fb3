"""Fixtures for tests/data/test_tokenizer.c: small tokenizers and what Hugging Face tokenizers makes of hard text.

    python3 generate.py        # needs `tokenizers` (versions.txt); writes *.json beside itself

For each tokenizer NAME there is NAME.tokenizer.json and NAME.cases.json:
[{"text", "ids" (no special tokens added), "ids_special", "decoded", "decoded_skip"}].
Training is deterministic; nothing here is random but the strings seeded with 7.
"""
import json
import os
import random
import sys

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre, processors, trainers

HERE = os.path.dirname(os.path.abspath(__file__))

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")

CORPUS = [
    "The quick brown fox jumps over the lazy dog; the dog didn't mind, because it's what foxes do.",
    "State space models keep a fixed-size state, whereas attention keeps every key and value it has seen.",
    "I'll say it again: we've trained 1234 models on 56789 tokens, and they're all different.",
    "Der schnelle braune Fuchs springt über den faulen Hund. Größe, Straße, Äpfel, Übung.",
    "El zorro marrón rápido salta sobre el perro perezoso. ¿Qué pasó mañana? ¡Nada!",
    "Быстрая коричневая лиса перепрыгивает через ленивую собаку. Съешь же ещё этих мягких булок.",
    "素早い茶色の狐はのろまな犬を飛び越える。東京は日本の首都です。カタカナとひらがな。",
    "敏捷的棕色狐狸跳过了懒狗。你好，世界！机器学习模型。",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다. 안녕하세요 세계.",
    "الثعلب البني السريع يقفز فوق الكلب الكسول. مرحبا بالعالم",
    "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है।",
    "int main(void)\n{\n    for (int i = 0; i < 10; i++) {\n\tprintf(\"%d\\n\", i);\n    }\n    return 0;\n}\n",
    "def f(x):\n    return x ** 2  # a comment\n\nclass A:\n    pass\n",
    "    indented    text\twith\ttabs   and  spaces  \n\n\n  newlines \r\n\r\n",
    "🙂 😀 👩‍👩‍👧‍👦 🇩🇪 ❤️ 👍🏽",
] * 3

CASES = [
    "", " ", "  ", "a", " a", "a ", "  a  ", "\n", "\n\n", " \n", "\n ", "\r\n", "\t", " \t \n \r\n  x",
    "Hello, world!", "The quick brown fox jumps over the lazy dog.", "don't DON'T Don't can'T it'S we'LL they'Re I'M",
    "'s't're've'm'll'd", "'\u017f 'K \u212a", "1234567890", "1 12 123 1234 12345 3.14159 1,000,000", "abc123def456",
    "\u0661\u0662\u0663\u0664 \u0967\u0968\u0969 \u2160\u2161 \u00bd\u00be \u00b2\u00b3 \u2460",
    "über Größe naïve café", "cafe\u0301 nai\u0308ve A\u030a \u212b \u1e9b\u0323 \u0344 \u0958",
    "\u1100\u1161\u11a8 \uac01 \uac00\u11a8", "a\u0301\u0323b\u0323\u0301", "Ωmega \u2126 \u00c5 \ufb01 \u2460",
    "Съешь же ещё этих мягких французских булок", "東京特許許可局", "你好，世界！", "안녕하세요", "مرحبا بالعالم ١٢٣",
    "สวัสดีชาวโลก", "नमस्ते दुनिया", "שלום עולם", "Γειά σου Κόσμε", "გამარჯობა", "ᐃᓄᒃᑎᑐᑦ", "𝒳𝓎𝓏 𐍈 𠜎𠜱",
    "🙂", "👩‍👩‍👧‍👦", "🇩🇪🇫🇷", "👍🏽 ❤️ ☃", "a🙂b", "\u200b\u200d\ufeff", "\u00a0\u2003\u3000\u1680\u180e\u2028\u2029\u0085",
    "a\u00a0b\u3000c\u180ed", "\u0000\u0001\u007f\u0080\u009f\u00ad", "tab\ttab\t\ttab", "line\nline\n\nline\r\nline\rline",
    "trailing spaces   ", "   leading", "in   the    middle", "x\n    indented\n\tcode", "a  \n  b", "\x0b\x0c\x1c\x1d\x1e\x1f",
    "for (int i = 0; i < n; i++) { a[i] += b->c * 2.5e-3f; } // ok", "#include <stdio.h>\n\nint main(void) { return 0; }\n",
    "https://example.org/a/b?c=d&e=%20#frag", "user@example.com", "!!!???...---", "$%^&*()_+{}|:\"<>?", "\\n\\t\\x00",
    "snake_case camelCase PascalCase kebab-case UPPER", "a" * 63, "a" * 64, "a" * 65, "a" * 700, "ab" * 300, "the" * 200,
    "0" * 301, " " * 130, "\n" * 97, "é" * 90, "漢" * 100, "." * 130, "aA1 " * 40, "Donaudampfschifffahrtsgesellschaft" * 8,
    "<s>", "</s>", "<unk>", "<0x41>", "▁", "▁▁a▁", "a▁b", "Ġ", "ĠĊ", "<|endoftext|>", "a<|endoftext|>b", "a <|endoftext|> b",
    "<|endoftext|><|endoftext|>", "<|endoftext", "<|begin_of_text|>Hi<|eot_id|>\n\nthere<|eot_id|>", "<|eot_id|> x  <|eot_id|>",
    "<|eot|><|eot_id|><|eot_id", "xx  <mask>  yy", "a<mask>b <mask>", "   <mask>   ", "<mask><mask>", "\u00a0<mask>\u3000\n z",
    "foo wordy word", "wordword word_ word-word (word)", "word", "\u00e9word word\u00e9 1word", "ÅNG \u212bNG A\u030aNG",
    "a <s> b </s> c", "Hello  World", "Hello\u2581World", " Hello", "\u2581Hello", "mixed 漢字 and عربي and 🙂 123", "İstanbul ıI ß ẞ ǆ",
    "\u0300abc", "e\u0301\u0301\u0301", "\ud7ff\ue000\uffff\U0010ffff", "\ufffd", "q\u0307\u0323", "\u1e0b\u0323",
]


def random_cases():
    rng = random.Random(7)
    alphabets = ["abcdefgh   ", "aä é\n\t 'sdt", "0123456789 ab.,", "漢字かな ab", "\u0301\u0323aeo ", " \n\r\t\u00a0\u3000x",
                 "🙂\u200d👩\ufe0f a", "<|>s/_ \u2581", "ابجد 123", "กขคงเ้่ a"]
    out = []
    for i in range(80):
        a = rng.choice(alphabets) + rng.choice(alphabets)
        out.append("".join(rng.choice(a) for _ in range(rng.randrange(1, 60))))
    for i in range(20):
        out.append("".join(chr(rng.choice([rng.randrange(0x20, 0x250), rng.randrange(0x250, 0x1000), rng.randrange(0x3000, 0xD7FF)]))
                           for _ in range(rng.randrange(1, 30))))
    return out


def gpt2():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre.ByteLevel.alphabet(),
                                                      special_tokens=["<|endoftext|>"], show_progress=False))
    t.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    t.add_tokens([AddedToken("word", single_word=True), AddedToken("ÅNG", normalized=True)])
    return t


def prefix_space():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.Split("_", "merged_with_previous"),
                                    pre.Split(Regex("[.]+"), "merged_with_next"), pre.ByteLevel(add_prefix_space=True)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=560, initial_alphabet=pre.ByteLevel.alphabet(),
                                                      special_tokens=["<s>", "</s>"], show_progress=False))
    t.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    t.post_processor = processors.RobertaProcessing(("</s>", t.token_to_id("</s>")), ("<s>", t.token_to_id("<s>")))
    return t


def llama3():
    t = Tokenizer(models.BPE(ignore_merges=True))
    t.pre_tokenizer = pre.Sequence([pre.Split(Regex(LLAMA3), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    t.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eot|>", "<|endoftext|>"])
    t.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                                      special_tokens=[("<|begin_of_text|>", t.token_to_id("<|begin_of_text|>"))])])
    return t


def sentencepiece(metaspace):
    t = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if metaspace:
        t.normalizer = normalizers.NFC()
        t.pre_tokenizer = pre.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    else:
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    corpus = CORPUS if metaspace else [" ".join(c.split()) for c in CORPUS]
    special = ["<unk>", "<s>", "</s>"] + ["<0x%02X>" % b for b in range(256)]
    t.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=800, special_tokens=special, limit_alphabet=150,
                                                      max_token_length=12, show_progress=False))
    js = json.loads(t.to_str())
    js["added_tokens"] = [a for a in js["added_tokens"] if not a["content"].startswith("<0x")]
    if metaspace:  # a vocabulary without some bytes: unk_token and fuse_unk are used
        lost = {"<0x%02X>" % b for b in range(0xE0, 0x100)}
        js["model"]["byte_fallback"] = False
        js["model"]["vocab"] = {k: v for k, v in js["model"]["vocab"].items() if k not in lost}
    t = Tokenizer.from_str(json.dumps(js))
    t.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    if metaspace:
        t.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    else:
        t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return t


def nfc():
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre.ByteLevel.alphabet(),
                                                      special_tokens=["<|endoftext|>"], show_progress=False))
    t.add_tokens([AddedToken("ÅNG", normalized=True), AddedToken("   ", normalized=False), AddedToken("  ", normalized=True)])
    return t


def splits():
    """Every behaviour, inverted and not, on patterns that leave gaps; no decoder: tokens joined by spaces."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre.Sequence([pre.Split(Regex(r"\s"), "removed"), pre.Split(Regex("[a-c]+"), "contiguous"),
                                    pre.Split(Regex(r"\p{L}+|\p{N}"), "merged_with_previous", invert=True),
                                    pre.Split(Regex("[0-4]"), "merged_with_next"), pre.Digits(individual_digits=False),
                                    pre.Split("the", "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=450, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    return t


def write(name, t, merges_as_text=False):
    js = json.loads(t.to_str())
    if merges_as_text:  # the form files had before tokenizers 0.20
        js["model"]["merges"] = [" ".join(m) for m in js["model"]["merges"]]
    with open(os.path.join(HERE, name + ".tokenizer.json"), "w", encoding="utf-8") as f:
        json.dump(js, f, ensure_ascii=False)
        f.write("\n")
    t = Tokenizer.from_str(json.dumps(js))
    out = []
    for text in CASES + random_cases():
        ids = t.encode(text, add_special_tokens=False).ids
        special = t.encode(text, add_special_tokens=True).ids
        out.append({"text": text, "ids": ids, "ids_special": special, "decoded": t.decode(special, skip_special_tokens=False),
                    "decoded_skip": t.decode(special, skip_special_tokens=True)})
    with open(os.path.join(HERE, name + ".cases.json"), "w", encoding="utf-8") as f:
        f.write("[\n" + ",\n".join(json.dumps(c, separators=(",", ":")) for c in out) + "\n]\n")


write("gpt2", gpt2(), merges_as_text=True)
write("prefix_space", prefix_space())
write("llama3", llama3())
write("fallback", sentencepiece(False))
write("metaspace", sentencepiece(True))
write("nfc", nfc())
write("splits", splits())
with open(os.path.join(HERE, "versions.txt"), "w") as f:
    f.write("python %d.%d.%d\ntokenizers %s\n" % (*sys.version_info[:3], tokenizers.__version__))
