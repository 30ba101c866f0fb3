#!/usr/bin/env bash
# bench/quality.sh BIN MODEL DATA [MAX_TOKENS]: what each weight format costs in quality.
#
# BIN holds hybrideval, DATA is a shard or text that MODEL was not trained on. One JSON line per
# format goes to stdout, as hybrideval --json prints it with the format's name before; a Markdown
# table goes to stderr, differences against the first format that works.
set -euo pipefail

[ $# -ge 3 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
bin=$1 model=$2 data=$3 max_tokens=${4:-}

number() { sed -n "s/.*\"$1\": *\([-0-9.e+]*\).*/\1/p" <<<"$2"; }

printf '| weights | perplexity | bits per byte | against fp32 |\n|---|---|---|---|\n' >&2
first=
for format in fp32 stored bf16 int8 fp8 int4 int4z; do
    line=$("$bin/hybrideval" --model "$model" --data "$data" --weights "$format" --json \
        ${max_tokens:+--max-tokens "$max_tokens"} 2> >(grep -v tokens/s >&2) | tr -d '\n')
    printf '{"weights": "%s", %s\n' "$format" "${line#\{}"
    perplexity=$(number perplexity "$line")
    first=${first:-$perplexity}
    awk -v f="$format" -v p="$perplexity" -v b="$(number bits_per_byte "$line")" -v q="$first" \
        'BEGIN { printf "| %s | %.4f | %.5f | %+.3f %% |\n", f, p, b, 100 * (p / q - 1) }' >&2
done
