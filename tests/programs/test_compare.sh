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
for plot in decode equal latency; do
    grep -q '<svg' plot-$plot.svg || fail "no SVG plot: $plot"
    [ "$(head -c 4 plot-$plot.png | tail -c 3)" = PNG ] || fail "no PNG plot: $plot"
done
[ ! -e plot.gp ] || fail "the plot's script is left"

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

# pieces: the same table again from the file, two contexts from two files, and what does not belong together
expect 0 compare --from figures.json --table again.md
diff again.md table.md >&2 || fail "another table from the file"
for context in 512 64; do
    expect 0 compare "$recipes/debug_tiny.cfg" "$source_dir/tests/golden/hf/llama" --contexts $context --batches 1,2 --seconds 0.01 \
        --rounds 1 --json piece$context.json
done
expect 0 compare --from piece512.json --from piece64.json --table both.md
for row in '64 | 1' '64 | 2' '512 | 1' '512 | 2'; do
    grep -q "^| $row | .*%) | .*%) |" both.md || fail "no row $row: $(cat both.md)"
done
expect 2 compare --from piece64.json model
expect 2 compare --from piece64.json --from figures.json
says 'only contexts may differ'
expect 3 compare --from /dev/null
