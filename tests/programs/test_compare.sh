#!/usr/bin/env bash
# hybridbench compare: two small models, a memory limit that cuts the batch, files, refusals.
. "$(dirname "$0")/common.sh"
compare() { "$bin/hybridbench" compare "$@"; }
recipes=$source_dir/recipes

expect 0 compare "$recipes/debug_tiny.cfg" "$source_dir/tests/golden/hf/llama" --weights int8 --contexts 64,512 --batches 1,3,1000 \
    --seconds 0.02 --rounds 2 --memory 6M --json figures.json --table table.md --plot plot
grep -q '^| 64 | 1 | [0-9.]* ([0-9]*%) | [0-9.]* ([0-9]*%) | [0-9.]* | [0-9.]* | [0-9]*% |$' table.md || fail "no first cell: $(cat table.md)"
grep -q '^| 512 | 1000 | [0-9.]* GB |' table.md || fail "1000 sequences of 512 tokens should not fit 6 MB: $(cat table.md)"
[ "$(grep -c '"step_p99_s"' figures.json)" -ge 12 ] || fail "figures are missing: $(cat figures.json)"
! grep -Eq '"(tokens_per_s|roof_tokens_per_s)": 0\.0' figures.json || fail "a rate of nothing"
grep -q '<svg' plot-decode.svg || fail "no SVG plot"
[ "$(head -c 4 plot-decode.png | tail -c 3)" = PNG ] || fail "no PNG plot"
[ ! -e plot-decode.gp ] || fail "the plot's script is left"

expect 2 compare only_one
says 'two models'
for bad in '--contexts 4,2' '--contexts 0' '--batches x' '--memory 1Q' '--rounds 99' '--seconds -1'; do
    # shellcheck disable=SC2086
    expect 2 compare a b $bad
    says "${bad%% *}"
done
expect 2 compare "$recipes/debug_tiny.cfg" "$recipes/debug_tiny.cfg" --weights int5
says 'int4z'
expect 1 compare "$recipes/debug_tiny.cfg" /nowhere/model
says '/nowhere/model'
