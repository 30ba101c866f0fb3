"""Writes data/unicode_new.h: characters that Hugging Face's patterns (Unicode 16) put into a class and
Unicode 14, which PCRE2 10.42 and this Python's unicodedata know, does not.

    python3.11 tests/golden/tokenizer/unicode.py > data/unicode_new.h      (versions: versions.txt)
"""
import unicodedata

from tokenizers import Regex, pre_tokenizers

assert unicodedata.unidata_version == "14.0.0", unicodedata.unidata_version
ALL = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def members(name):
    split = pre_tokenizers.Split(Regex(r"\p{%s}" % name), "removed")
    found = set(ALL)
    for i in range(0, len(ALL), 4096):
        for piece, _ in split.pre_tokenize_str("".join(map(chr, ALL[i:i + 4096]))):
            found.difference_update(map(ord, piece))
    return found


def ranges(code_points):
    runs = []
    for c in sorted(code_points):
        if runs and runs[-1][1] == c - 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    return ["\\\\x{%X}" % a if a == b else "\\\\x{%X}-\\\\x{%X}" % (a, b) for a, b in runs]


print("/* data/unicode_new.h: written by tests/golden/tokenizer/unicode.py, do not edit. Members that the")
print(" * general categories gained from Unicode 15 to 16, as ranges of a PCRE2 class. */")
print("/* clang-format off */")
print("static const struct {\n    const char *name, *ranges;\n} unicode_new[] = {")
for name in ["L", "Lu", "Ll", "Lm", "Lo", "M", "N", "Nd", "P", "S"]:
    new = [c for c in members(name) if not unicodedata.category(chr(c)).startswith(name)]
    print('    { "%s",' % name)
    line = ""
    for r in ranges(new):
        if len(line) + len(r) > 84:
            print('      "%s"' % line)
            line = ""
        line += r
    print('      "%s" },' % line)
print("};\n/* clang-format on */")
