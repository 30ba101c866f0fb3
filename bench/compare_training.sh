#!/usr/bin/env bash
# compare_training.sh PYTHON [RECIPE]: training tokens/s of a recipe's model against PyTorch on the same cores, in
# turn: ours, peer, ours, peer ... One JSON object per line goes to stdout. PYTHON has torch and transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 recipe=${2:-recipes/bamba130m.cfg}
bin=build/bin
config=$(mktemp)
trap 'rm -f "$config"' EXIT
$bin/hybridtrain --print-hf-config "$recipe" >"$config"
threads=$(nproc)
export OMP_NUM_THREADS=$threads
ours() { $bin/bench_train_step "$recipe" model.chunk=64 train.global_batch_tokens=$((512 * 2048)) "$@"; }
peer() { "$python" bench/peers/torch_train.py "$1" --config "$config" --threads "$threads" "${@:2}" 2>/dev/null; }
for seq in 1024 4096; do
    rows=$((4096 / seq))
    ours --seq $seq --rows $rows --steps 3
    peer best --seq $seq --rows $rows --steps 2
    ours --seq $seq --rows $rows --steps 3
    # Hugging Face's path keeps every chunk's products: recomputation where memory is short
    recompute=(); [ $seq -le 1024 ] || recompute=(--recompute)
    peer hf --seq $seq --rows $rows --steps 1 "${recompute[@]}"
    ours --seq $seq --rows $rows --steps 3
    peer hf --seq $seq --rows $rows --steps 1 --chunk 64 "${recompute[@]}"
    ours --seq $seq --rows $rows --steps 3
done
