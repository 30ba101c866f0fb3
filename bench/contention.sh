#!/usr/bin/env bash
# contention.sh MODEL [LLAMA_BENCH GGUF]: what a neighbour that keeps one core busy costs. Decoding speed (one sequence, 16
# sequences) and prefill of a model folder, alone and beside a loop on core 0, in turn, and llama.cpp's where it is given. One JSON
# object per measurement goes to stdout.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 peer=${2:-} gguf=${3:-}
bin=${HT_BIN:-build/bin}
threads=$(nproc)

ours() { # NEIGHBOUR OPTIONS
    "$bin/bench_inference" --model "$model" --weights stored --threads "$threads" "${@:2}" --reps 3 |
        sed "s|\"model\": \"[^\"]*\"|\"model\": \"$(basename "$model")\", \"neighbour\": \"$1\"|"
}
theirs() { # NEIGHBOUR
    local rates
    rates=$("$peer" -m "$gguf" -t "$threads" -p 0 -n 32 -r 3 -o json 2>/dev/null | tr -d '\n' |
        sed 's/.*"samples_ts": \[\([^]]*\)\].*/\1/; s/  */ /g')
    printf '{"program": "llama.cpp", "model": "%s", "neighbour": "%s", "test": "decode", "batch": 1, "all": [%s]}\n' \
        "$(basename "$gguf")" "$1" "$rates"
}
all() { # NEIGHBOUR
    ours "$1" --decode 64
    ours "$1" --decode 24 --batch 16 --depth 32
    ours "$1" --prefill 1024
    [ -z "$peer" ] || theirs "$1"
}
loop=
trap '[ -z "$loop" ] || kill "$loop"' EXIT
for _ in 1 2; do
    all none
    taskset -c 0 sh -c 'while :; do :; done' &
    loop=$!
    all busy
    kill "$loop"
    loop=
done
