#!/usr/bin/env bash
# hybridtrain on the emulated CUDA device: the loss curve of the CPU backend, on one and two ranks; a stopped and resumed
# run has the bits of one that went through. test_train_emu.sh BIN_DIR SOURCE_DIR
source "$(dirname "$0")/../programs/common.sh"

# emu PROGRAM RANKS NAME [overrides]: a micro-batch takes a second under emulation
emu() {
    local program=$1 ranks=$2 name=$3
    shift 3
    mpirun -n "$ranks" --oversubscribe "$program" "$source_dir/recipes/debug_tiny.cfg" model.vocab_size=320 \
        data.train=train.h5 data.eval=train.h5 data.tokenizer=tokenizer.json eval.max_tokens=64 \
        train.micro_batch=1 train.global_batch_tokens=128 train.steps=4 checkpoint.every_steps=2 \
        schedule.warmup_steps=2 parallel.bucket_bytes=50000 "train.name=$name" "$@"
}
cpu() { emu "$tests/hybridtrain_emu" "$@" parallel.device=cpu; }
cuda() { emu "$tests/hybridtrain_emu" "$1" "$2" parallel.device=cuda parallel.share_gpus=true "${@:3}"; }
last() { ls -d "runs/$1"/checkpoints/step-* | tail -n 1; }
same() { "$tests/ckpt_diff" "$(last "$1")" "$(last "$2")" >diff.txt 2>&1 || { cat diff.txt; fail "$1 and $2 differ"; }; }

# near NAME REFERENCE BOUND: largest relative difference of the losses of all steps
near() {
    losses "$1" >a.txt
    losses "$2" >b.txt
    [ "$(wc -l <a.txt)" = 4 ] || fail "$1: $(wc -l <a.txt) steps instead of 4"
    paste a.txt b.txt | awk -v bound="$3" '
        { d = ($2 - $4) / $4; if (d < 0) d = -d; if (d > most) most = d; if ($1 != $3) exit 2 }
        END { printf "largest relative difference of the loss: %.3g, at most %s\n", most, bound; exit !(most <= bound) }' ||
        fail "the loss curve of $1 is not that of $2"
}

make_data
expect 0 cpu 1 cpu32
expect 0 cuda 1 gpu32
says "CUDA"
says "evaluation at step 4"
near gpu32 cpu32 1e-6 # fp32 on both sides, another order of sums; measured 9e-9

# from the checkpoint in the middle on: the same bits
cuda_step2=$PWD/runs/gpu32/checkpoints/step-00000002
expect 0 cuda 1 resumed "train.resume=$cuda_step2"
says "resumed from"
same resumed gpu32

# two ranks on the device: sharded state, collectives on device memory; everything in bf16 and recomputed
expect 1 cuda 2 refused parallel.share_gpus=false
says "2 ranks on this host and 1 GPU(s)"
expect 0 cuda 2 ranks
near ranks cpu32 1e-6 # measured 7e-9
expect 0 cpu 2 cpu16 train.precision=bf16 parallel.zero_stage=3 train.recompute=full
expect 0 cuda 2 gpu16 train.precision=bf16 parallel.zero_stage=3 train.recompute=full
near gpu16 cpu16 5e-4 # the two round at different places to 2^-9; measured 4e-5
expect 0 cuda 2 resumed16 train.precision=bf16 parallel.zero_stage=3 train.recompute=full \
    "train.resume=$PWD/runs/gpu16/checkpoints/step-00000002"
same resumed16 gpu16

# projections in fp8: refused without it; near bf16, in whole weights and in weights that come and go, resumed with its bits
expect 1 cuda 1 none8 train.precision=bf16 train.linear_dtype=fp8
says "emulated has 8.0; set it to"
expect 2 cpu 1 none8 train.precision=bf16 train.linear_dtype=fp8
says "only GPUs multiply fp8"
expect 2 cuda 1 none8 train.linear_dtype=fp8
says 'set that to "bf16"'
export HT_EMU_ARCH=89
expect 0 cuda 1 gpu8 train.precision=bf16 train.linear_dtype=fp8
says "fp8 in "
says "multiples of 16"
near gpu8 cpu16 5e-3
expect 0 cuda 1 resumed8 train.precision=bf16 train.linear_dtype=fp8 \
    "train.resume=$PWD/runs/gpu8/checkpoints/step-00000002"
same resumed8 gpu8
expect 0 cuda 2 shards8 train.precision=bf16 train.linear_dtype=fp8 parallel.zero_stage=3 train.recompute=full
near shards8 gpu8 5e-3
unset HT_EMU_ARCH

# a checkpoint of the device goes on on the CPU
expect 0 cpu 1 back "train.resume=$cuda_step2"
near_back() { "$tests/ckpt_diff" --close 1e-5 "$(last back)" "$(last gpu32)" >diff.txt 2>&1 || { cat diff.txt; fail "back"; }; }
near_back

# a gradient that is not finite changes nothing and is counted (weights times -99 in every step end there)
expect 7 cuda 1 skipped optimizer.lr=100 optimizer.weight_decay=1 schedule.kind=constant schedule.warmup_steps=1 \
    train.steps=40 train.max_bad_steps=2 train.global_batch_tokens=64 checkpoint.every_steps=0
says "weights left as they were"
CUDA_VISIBLE_DEVICES= expect 1 "$bin/hybridtrain" "$source_dir/recipes/debug_tiny.cfg" data.train=train.h5 parallel.device=cuda
says "has no GPU"
says "hybridtrain --plan"
echo "all right"
