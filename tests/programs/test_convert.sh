#!/usr/bin/env bash
# hybridconvert: every kind of folder to our own and to Hugging Face form, quantised, damaged, refused.
. "$(dirname "$0")/common.sh"
convert() { "$bin/hybridconvert" "$@"; }
ids() { "$bin/hybridgen" --model "$1" --ids 5,6,7 --print-ids --temperature 0 --n-predict 8 --ignore-eos "${@:2}"; }

# Hugging Face -> our own -> Hugging Face -> our own: the same bytes of weights, the same ids
for kind in bamba llama mamba2; do
    hf=$source_dir/tests/golden/hf/$kind
    expect 0 convert "$hf" "$kind.h5" --dtype fp32
    says 'parameters'
    expect 0 convert "$kind.h5" "$kind.hf" --to safetensors
    expect 0 convert "$kind.hf" "$kind.again"
    cmp "$kind.h5/weights.h5" "$kind.again/weights.h5" || fail "$kind: weights changed on the way"
    for folder in "$hf" "$kind.h5" "$kind.hf"; do
        expect 0 ids "$folder" --fp32
        [ "$folder" = "$hf" ] && cp out want.txt
        cmp want.txt out || fail "$kind: $folder gives other ids"
    done
done
expect 0 convert bamba.h5 bamba.twice --dtype bf16
expect 0 convert bamba.twice bamba.back --to safetensors
expect 0 convert bamba.back bamba.thrice
cmp bamba.twice/weights.h5 bamba.thrice/weights.h5 || fail "bf16 weights changed on the way"
! ls -d -- *.tmp-* 2>/dev/null || fail "temporary folders are left"

# quantised: smaller, the same codes from any form of the same values, usable everywhere
for format in int8 int4 int4z fp8 bf16; do
    expect 0 convert bamba.h5 "q.$format" --quantize "$format"
    [ "$format" = bf16 ] || says 'relative error'
    expect 0 convert bamba.hf "r.$format" --quantize "$format" --threads 1
    cmp "q.$format/weights.h5" "r.$format/weights.h5" || fail "$format: another source gives other codes"
    expect 0 ids "q.$format"
    [ "$(wc -w <out)" -eq 8 ] || fail "8 ids expected of q.$format"
    expect 0 convert "q.$format" "d.$format" --to safetensors --dtype fp32
    expect 0 ids "q.$format" --fp32
    cp out want.txt
    expect 0 ids "d.$format" --fp32
    cmp want.txt out || fail "$format: the dequantised folder gives other ids"
done
size() { stat -c %s "$1/weights.h5"; }
[ "$(size q.int4)" -lt "$(size q.int8)" ] && [ "$(size q.int8)" -lt "$(size q.bf16)" ] || fail "sizes are not in order"
expect 0 convert bamba.h5 q.64 --quantize int4 --group 64
[ "$(size q.64)" -lt "$(size q.int4)" ] || fail "wider groups are not smaller"
if command -v h5dump >/dev/null; then
    expect 0 h5dump -H q.int4z/weights.h5
    says '"codes"'
    says '"zeros"'
fi

# a run of our own: recipe and tokenizer travel along
make_data
expect 0 train 1 run train.steps=3 checkpoint.every_steps=3
expect 0 convert runs/run run.h5
[ -s run.h5/recipe.cfg ] && cmp tokenizer.json run.h5/tokenizer.json || fail "recipe or tokenizer is missing"
text() { "$bin/hybridgen" --model "$1" --prompt 'static int' --temperature 0 --n-predict 12 --fp32 --ignore-eos; }
expect 0 text runs/run
cp out want.txt
expect 0 text run.h5
cmp want.txt out || fail "the converted run talks differently"
expect 0 convert run.h5 run.hf --to safetensors
expect 0 text run.hf
cmp want.txt out || fail "the exported run talks differently"

# refusals; nothing is left behind
expect 2 convert bamba.h5
expect 2 convert bamba.h5 new --quantize q4_0
says int4z
expect 2 convert bamba.h5 new --to gguf
expect 2 convert bamba.h5 new --group 16
expect 2 convert bamba.h5 new --dtype fp8
expect 2 convert bamba.h5 new --to safetensors --quantize int8
says 'dense weights only'
expect 2 convert bamba.h5 q.int8
says 'is there already'
expect 1 convert nowhere new
expect 1 convert bamba.h5 tokenizer.json/new
[ ! -e new ] || fail "a refused conversion left a folder"
flip() { # FILE BYTE: one bit of it
    local b
    b=$(od -An -tu1 -j "$2" -N 1 "$1")
    printf "$(printf '\\%03o' $((b ^ 4)))" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}
cp -r q.int8 bad
flip bad/weights.h5 $(($(size bad) / 2))
expect 3 convert bad new
says 'damaged: tensor'
cp q.int8/weights.h5 bad/
flip bad/weights.json 300
expect 3 ids bad
says 'does not match the hash'
cp q.int8/weights.json bad/
truncate -s -1 bad/weights.h5
expect 3 ids bad
cp q.int8/weights.h5 bad/
echo '{}' >bad/config.json
expect 3 ids bad
says config.json
cp q.int8/config.json bad/
expect 0 ids bad
rm bad/weights.h5
expect 1 ids bad
! ls -d -- *.tmp-* 2>/dev/null || fail "temporary folders are left"
echo "conversions agree"
