#!/usr/bin/env bash
# compare_inference.sh LLAMA_BIN FOLDER GGUF [PAIRS [TEST ...]]: speed of a Hugging Face folder here (FOLDER-int8 and FOLDER-int4
# where hybridconvert made them, else quantised while loading) and of the same model in llama.cpp (GGUF-bf16.gguf, GGUF-Q8_0.gguf,
# GGUF-Q4_0.gguf; programs in LLAMA_BIN), in turn: ours, peer, ours, peer ...
# A TEST is FORMAT:KIND with FORMAT bf16, int8 or int4 and KIND prefillN, decodeB or decode1@DEPTH (B sequences; one
# sequence behind DEPTH tokens). The peer reads the DEPTH tokens first, which takes minutes: there PAIRS repetitions of the peer
# stand between twice as many of ours. One JSON object per measurement goes to stdout; inference_table.sh makes a table of them.
set -euo pipefail
cd "$(dirname "$0")/.."
llama=$1 folder=$2 gguf=$3 pairs=${4:-5}
shift $(($# < 4 ? $# : 4))
bin=${HT_BIN:-build/bin}
threads=$(nproc)
name=$(basename "$folder")
[ $# -gt 0 ] || set -- {bf16,int8,int4}:{prefill2048,decode1,decode16,decode1@16384}

ours() { # FORMAT OPTIONS
    local model=$folder weights=$1
    if [ -e "$folder-$1/weights.h5" ]; then model=$folder-$1 weights=stored; fi
    "$bin/bench_inference" --model "$model" --weights $weights --threads "$threads" "${@:2}" |
        sed "s|\"model\": \"[^\"]*\", \"weights\": \"[^\"]*\"|\"model\": \"$name\", \"weights\": \"$format\"|; s|\"test\": |\"kind\": \"$kind\", \"test\": |"
}
peer_file() {
    case $1 in
        bf16) echo "$gguf-bf16.gguf" ;;
        int8) echo "$gguf-Q8_0.gguf" ;;
        int4) echo "$gguf-Q4_0.gguf" ;;
        *) echo "compare_inference.sh: format $1; bf16, int8 or int4" >&2; exit 64 ;;
    esac
}
rates() { tr -d '\n' | sed 's/.*"samples_ts": \[\([^]]*\)\].*/\1/; s/  */ /g'; }
peer() { # FORMAT KIND
    local file out
    file=$(peer_file "$1")
    case $2 in
        prefill*) out=$("$llama/llama-bench" -m "$file" -t "$threads" -p "${2#prefill}" -n 0 -r 1 -o json 2>/dev/null | rates) ;;
        *@*) out=$("$llama/llama-bench" -m "$file" -t "$threads" -p 0 -n 32 -d "${2#*@}" -r "$pairs" -o json 2>/dev/null | rates) ;;
        decode1) out=$("$llama/llama-bench" -m "$file" -t "$threads" -p 0 -n 64 -r 1 -o json 2>/dev/null | rates) ;;
        decode*) out=$("$llama/llama-batched-bench" -m "$file" -t "$threads" -c 2048 -npp 32 -ntg 24 -npl "${2#decode}" \
            --output-format jsonl 2>/dev/null | grep -o '"speed_tg": [0-9.]*' | tail -n 1 | cut -d ' ' -f 2) ;;
    esac
    printf '{"program": "llama.cpp", "model": "%s", "weights": "%s", "threads": %s, "kind": "%s", "all": [%s], "file": "%s"}\n' \
        "$name" "$1" "$threads" "$2" "$out" "$(basename "$file")"
}
for test in "$@"; do
    format=${test%%:*} kind=${test#*:}
    case $kind in
        prefill*) options=(--prefill "${kind#prefill}" --reps 1) ;;
        *@*) options=(--decode 32 --depth "${kind#*@}" --reps "$pairs") ;;
        decode1) options=(--decode 64 --reps 1) ;;
        *) options=(--decode 24 --batch "${kind#decode}" --depth 32 --reps 1) ;;
    esac
    case $kind in
        *@*)
            ours "$format" "${options[@]}"
            peer "$format" "$kind"
            ours "$format" "${options[@]}"
            ;;
        *)
            for _ in $(seq "$pairs"); do
                ours "$format" "${options[@]}"
                peer "$format" "$kind"
            done
            ;;
    esac
done
