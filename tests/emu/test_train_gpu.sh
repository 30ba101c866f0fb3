#!/usr/bin/env bash
# hybridtrain on a GPU: recipes/quickstart.cfg gives the CPU's loss curve and resumes with the same bits. 77: no GPU.
# test_train_gpu.sh BIN_DIR SOURCE_DIR
command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1 || { echo "skipped: no GPU"; exit 77; }
source "$(dirname "$0")/../programs/common.sh"

quick() { # NAME [overrides]
    local name=$1
    shift
    "$bin/hybridtrain" "$source_dir/recipes/quickstart.cfg" model.vocab_size=320 data.train=train.h5 data.eval=train.h5 \
        data.tokenizer=tokenizer.json train.steps=40 checkpoint.every_steps=20 log.every_steps=1 log.plot=false \
        eval.max_tokens=8192 "train.name=$name" "$@"
}
near() { # NAME REFERENCE BOUND: relative, at every step
    losses "$1" >a.txt
    losses "$2" >b.txt
    [ "$(wc -l <a.txt)" = 40 ] || fail "$1: $(wc -l <a.txt) steps instead of 40"
    paste a.txt b.txt | awk -v bound="$3" '
        { d = ($2 - $4) / $4; if (d < 0) d = -d; if (d > most) most = d; if ($1 != $3) exit 2 }
        END { printf "largest relative difference of the loss: %.3g, at most %s\n", most, bound; exit !(most <= bound) }' ||
        fail "the loss curve of $1 is not that of $2"
}

unset OMP_NUM_THREADS
make_data
for precision in fp32 bf16; do
    expect 0 quick cpu-$precision parallel.device=cpu train.precision=$precision
    expect 0 quick gpu-$precision parallel.device=cuda train.precision=$precision
    says "CUDA"
done
near gpu-fp32 cpu-fp32 1e-3
near gpu-bf16 cpu-bf16 1e-2
expect 0 quick resumed parallel.device=cuda train.precision=bf16 "train.resume=$PWD/runs/gpu-bf16/checkpoints/step-00000020"
"$tests/ckpt_diff" "$(ls -d runs/resumed/checkpoints/step-*40)" "$(ls -d runs/gpu-bf16/checkpoints/step-*40)" || fail "resumed"
echo "all right"
