#!/usr/bin/env bash
# hybridgen and hybrideval on a run folder, a checkpoint and a Hugging Face folder.
. "$(dirname "$0")/common.sh"
make_data
expect 0 train 2 talk train.steps=30

# text from a run folder: greedy twice is the same; seeds differ; ids work without text
gen() { "$bin/hybridgen" --model runs/talk "$@"; }
expect 0 gen --prompt 'static int' --temperature 0 --n-predict 20
cp out one.txt
expect 0 gen --prompt 'static int' --temperature 0 --n-predict 20
cmp one.txt out || fail "greedy generation differs from itself"
expect 0 gen --prompt 'static int' --seed 1 --temperature 1 --n-predict 30 --ignore-eos
cp out seed1.txt
expect 0 gen --prompt 'static int' --seed 2 --temperature 1 --n-predict 30 --ignore-eos
cmp -s seed1.txt out && fail "two seeds give the same text"
printf 'static int' | expect 0 gen --temperature 0 --n-predict 20
cmp one.txt out || fail "the prompt on standard input gives another text"
expect 0 gen --ids 1,2,3 --print-ids --temperature 0 --n-predict 5 --ignore-eos
[ "$(wc -w <out)" -eq 5 ] || fail "5 ids expected: $(cat out)"
expect 2 gen --ids 1,99999 --print-ids
says 99999
expect 2 gen --prompt x --top-p 7
says top-p

# the end of a text: a model of short documents ends where they end, and goes on only when asked to
for _ in $(seq 3000); do echo '{"text": "for (;;)"}'; done >short.jsonl
expect 0 "$bin/hybriddata" tokenize --tokenizer tokenizer.json --eos '<|end|>' --field text --out short.h5 short.jsonl
expect 0 train 1 short data.train=short.h5 data.eval=short.h5 train.steps=60 data.pack_leak=true
short() { "$bin/hybridgen" --model runs/short --prompt 'for (' --temperature 0 --n-predict 40 "$@"; }
expect 0 short
[ "$(cat out)" = ';;)' ] || fail "';;)' and no more expected: $(cat out)"
expect 0 short --print-ids
n=$(wc -w <out)
[ "$n" -lt 40 ] || fail "generation went on after the end: $(cat out)"
expect 0 short --print-ids --ignore-eos
[ "$(wc -w <out)" -eq 40 ] || fail "40 ids expected with --ignore-eos: $(cat out)"
grep -qF '"<|end|>"' tokenizer.json || fail "no <|end|> in tokenizer.json"
end_id=$(cut -d' ' -f$((n + 1)) out)
grep -qE "\"id\": *$end_id,|\"<\|end\|>\": *$end_id" tokenizer.json || fail "id $end_id is not <|end|>"
expect 0 "$bin/hybridgen" --model runs/short/checkpoints/step-00000060 --tokenizer tokenizer.json --prompt 'for (' \
    --temperature 0 --n-predict 40
[ "$(cat out)" = ';;)' ] || fail "a checkpoint folder: ';;)' expected: $(cat out)"

# a Hugging Face folder, without a tokenizer
hf=$source_dir/tests/golden/hf/bamba
expect 0 "$bin/hybridgen" --model "$hf" --ids 5,6,7 --print-ids --temperature 0 --n-predict 4 --ignore-eos
expect 2 "$bin/hybridgen" --model "$hf" --prompt text
says tokenizer

# evaluation: shard and text agree; log-probabilities add up to the loss
expect 0 "$bin/hybrideval" --model runs/talk --data train.h5 --json
grep -o '"bits_per_byte": [0-9.]*' out >shard.txt || fail "no bits per byte"
echo '{"ids": [1, 2, 3, 4, 5, 6, 7]}' >ids.jsonl
echo '{"ids": [9]}' >>ids.jsonl
"$bin/hybrideval" --model runs/talk --tokens ids.jsonl --logprobs >logprobs.txt 2>err.txt || fail "$(cat err.txt)"
[ "$(wc -l <logprobs.txt)" -eq 2 ] || fail "a line per line expected"
[ "$(tail -n 1 logprobs.txt)" = '{"logprobs":[]}' ] || fail "one token has no log-probability"
"$bin/hybrideval" --model runs/talk --tokens ids.jsonl --json >loss.txt 2>err.txt
mean=$(head -n 1 logprobs.txt | sed 's/.*\[\(.*\)\].*/\1/' | tr , '\n' | awk '{ s += $1; n++ } END { print -s / n }')
loss=$(sed 's/.*"loss": \([0-9.]*\).*/\1/' loss.txt)
awk -v a="$mean" -v b="$loss" 'BEGIN { d = a - b; exit !(d < 1e-4 && d > -1e-4) }' || fail "log-probabilities $mean, loss $loss"
echo '{"ids": [1, "two"]}' >bad.jsonl
expect 3 "$bin/hybrideval" --model runs/talk --tokens bad.jsonl --logprobs
says 'bad.jsonl:1'
expect 1 "$bin/hybrideval" --model nowhere --data train.h5
says nowhere
echo "all right"
