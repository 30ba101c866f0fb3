#!/usr/bin/env bash
# Kill a training run again and again while it saves, resume it each time with the same command, and compare the end
# with an undisturbed run, bit for bit.
#
#   kill_resume.sh [--kills N] [--ranks N | --ranks 1,2,3] [--seed N] [--bin DIR] [--tests DIR] [--keep]
#
# The recipe (kill.cfg) saves after every step, so that nearly every moment lies within a save. Half of the kills are
# SIGKILL to all ranks after a random time, the other half happen at a named point of writing or publishing
# (HT_CKPT_CRASH_AT, docs/checkpoints.md). When a run reaches its end before the kills are used up, it is compared and
# the next round begins. After each kill:
#   - the newest checkpoint is not older than the newest one before the kill (nothing is lost);
#   - the next start resumes from exactly that one.
#
# With a list of rank counts every start takes the next of them. Sums are then rounded in another order, so bits cannot
# be compared; instead, with the undisturbed run on the first count:
#   - the loader's and the trainer's state in every checkpoint of a multiple of 5 steps is the same, to the character;
#   - the loss of every step is the same to 1e-6 of it, and the final weights to 1e-5 of each tensor's norm;
#   - an undisturbed run with another order of the data fails these two, so that they mean something.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kills=10 ranks=2 seed=1 keep=0
bin=$here/../../build/bin
tests=$here/../../build/tests
while [ $# -gt 0 ]; do
    case $1 in
    --kills) kills=$2; shift ;;
    --ranks) ranks=$2; shift ;;
    --seed) seed=$2; shift ;;
    --bin) bin=$2; shift ;;
    --tests) tests=$2; shift ;;
    --keep) keep=1 ;;
    *) sed -n '2,5p' "$0"; exit 2 ;;
    esac
    shift
done
IFS=, read -r -a counts <<<"$ranks"
ranks=${counts[0]}
mixed=$((${#counts[@]} > 1))
# rows of a step that 1, 2, 3, 4 and 6 ranks can share; fp32, so that the order of sums is all that differs
options=()
[ $mixed = 0 ] || options=(train.precision=fp32 train.global_batch_tokens=384 train.micro_batch=1 checkpoint.keep_every=5
    log.every_steps=1)
bin=$(cd "$bin" && pwd)
tests=$(cd "$tests" && pwd)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
RANDOM=$seed
work=$(mktemp -d "${TMPDIR:-/tmp}/ht-kill-XXXXXX")
[ $keep = 1 ] || trap 'rm -rf "$work"' EXIT
cd "$work"
points=(open mid-write before-fsync after-fsync before-manifest after-manifest after-rename after-latest mid-prune)

say() { printf '%s\n' "$*"; }
fail() {
    trap - EXIT # what is left may explain it
    say "FAILED: $* (files in $work)"
    say "--- the end of the run's log:"
    tail -n 20 runs/killed/train.log output 2>/dev/null || true
    exit 1
}

# Start a job in the background: job = mpirun's process.
start() {
    local name=$1
    shift
    mpirun -n "$ranks" --oversubscribe --bind-to none "$bin/hybridtrain" "$here/kill.cfg" \
        data.train="$work/kill-data.h5" train.out_dir=runs train.name="$name" "${options[@]}" "$@" >>output 2>&1 &
    job=$!
}
rank_pids() { pgrep -P "$job" -x hybridtrain -r R,S,D || true; } # living ones
kill_ranks() {
    local pids
    pids=$(rank_pids)
    # shellcheck disable=SC2086
    [ -z "$pids" ] || kill -KILL $pids 2>/dev/null || true
}
newest() { # step of the newest published checkpoint, -1 without any
    local last=-1 d
    for d in runs/killed/checkpoints/step-*/; do
        [ -d "$d" ] || continue
        d=${d%/}
        last=$((10#${d##*step-}))
    done
    echo "$last"
}

# "step loss" of every step that counts
losses() {
    grep -v superseded "runs/$1/metrics.jsonl" | grep '"train/loss"' |
        sed 's/.*"step": *\([0-9]*\),.*"train\/loss": *\([^,}]*\).*/\1 \2/'
}
# The largest relative difference of a step's loss between two runs, "none" when their steps differ.
loss_difference() {
    paste -d' ' <(losses "$1") <(losses "$2") | awk '
        $1 != $3 { print "none"; exit 1 }
        { d = ($2 - $4) / $2; if (d < 0) d = -d; if (d > most) most = d }
        END { printf "%.3g\n", most }'
}
# same_end NAME: is the end of that run the undisturbed run's? What was found goes to the file difference.
same_end() {
    local last difference step
    last=runs/$1/checkpoints/$(cat "runs/$1/checkpoints/LATEST")
    if [ $mixed = 0 ]; then
        "$tests/ckpt_diff" "runs/undisturbed/checkpoints/$reference" "$last" >difference
        return
    fi
    : >difference
    for step in runs/undisturbed/checkpoints/step-*[05]/; do
        "$tests/ckpt_diff" --state "$step" "runs/$1/checkpoints/$(basename "$step")" >>difference || return 1
    done
    difference=$(loss_difference undisturbed "$1")
    echo "loss of a step differs by at most $difference of it" >>difference
    awk -v d="$difference" 'BEGIN { exit !(d != "none" && d <= 1e-6) }' || return 1
    "$tests/ckpt_diff" --close 1e-5 "runs/undisturbed/checkpoints/$reference" "$last" >>difference
}

"$tests/kill_data" kill-data.h5
trap 'say "FAILED: line $LINENO: exit code $?"' ERR
began=$(date +%s)
start undisturbed
wait "$job" || { cat output; fail "the undisturbed run ended with exit code $?"; }
full_ms=$((($(date +%s) - began) * 1000 + 1000))
reference=$(cat runs/undisturbed/checkpoints/LATEST)
if [ $mixed = 1 ]; then
    start other-order data.seed=6
    wait "$job" || { cat output; fail "the run with another order ended with exit code $?"; }
    other=$(loss_difference undisturbed other-order)
    awk -v d="$other" 'BEGIN { exit !(d > 1e-3) }' || fail "another order of the data changes losses by $other only"
    if "$tests/ckpt_diff" --close 1e-2 "runs/undisturbed/checkpoints/$reference" \
        "runs/other-order/checkpoints/$reference" >difference; then
        fail "another order of the data gives the same weights"
    fi
    say "for comparison, another order of the data: losses differ by $other, $(grep "at most" difference)"
fi
say "undisturbed run: $reference, about $((full_ms / 1000)) s; ranks ${counts[*]}, seed $seed, $(date -u +%FT%TZ), $(uname -srm)"

n_starts=0 done_kills=0 rounds=0 during_save=0 expected=-1 n_resumes=0
declare -A at_point=()
while :; do
    resumes_before=$(grep -c 'resumed from' runs/killed/train.log 2>/dev/null || true)
    target=
    ranks=${counts[n_starts % ${#counts[@]}]}
    n_starts=$((n_starts + 1))
    if [ $done_kills -lt "$kills" ]; then
        if [ $((RANDOM % 2)) = 0 ]; then
            target=${points[RANDOM % ${#points[@]}]}
            case $target in
            open | mid-write | before-fsync | after-fsync) n=$((1 + RANDOM % 40)) ;; # 8 passes per save of rank 0
            *) n=$((1 + RANDOM % 4)) ;;
            esac
            HT_CKPT_CRASH_AT=$target:$n start killed
        else
            target="time"
            start killed
        fi
    else
        start killed
    fi

    if [ "$target" = time ]; then
        ms=$((200 + RANDOM % 1800))
        sleep "$(printf '%d.%03d' $((ms / 1000)) $((ms % 1000)))"
        kill_ranks
    elif [ -n "$target" ]; then
        # the rank that hits the point is gone at once; the others must not live on to save on their own
        seen=0
        while kill -0 "$job" 2>/dev/null; do
            n_now=$(rank_pids | wc -l)
            [ "$n_now" -lt "$ranks" ] || seen=1
            if [ $seen = 1 ] && [ "$n_now" -lt "$ranks" ]; then
                [ "$n_now" = 0 ] || kill_ranks
                break
            fi
            sleep 0.02
        done
    fi
    # mpirun caught between starting its ranks can wait for ever for those that never came
    if [ -n "$target" ]; then
        for ((i = 0; i < 150; i++)); do
            kill -0 "$job" 2>/dev/null || break
            [ "$(rank_pids | wc -l)" = 0 ] || i=0 # still at work
            sleep 0.1
        done
        if [ "$i" = 150 ]; then
            say "mpirun hangs without ranks: killed too"
            kill -KILL "$job"
        fi
    fi
    code=0
    wait "$job" || code=$?
    last=$(newest)
    [ "$last" -ge "$expected" ] || fail "kill $done_kills ($target): newest checkpoint $last, before it was $expected"

    # did this start go on from where the one before it had ended?
    resumes=$(grep -c 'resumed from' runs/killed/train.log 2>/dev/null || true)
    if [ "${resumes:-0}" -gt "${resumes_before:-0}" ]; then
        from=$(grep 'resumed from' runs/killed/train.log | tail -n 1 | sed 's/.*step-0*\([0-9][0-9]*\):.*/\1/')
        [ "$from" = "$expected" ] || fail "resumed from step $from; the newest checkpoint was $expected"
        n_resumes=$((n_resumes + 1))
    fi
    if grep -q 'cannot be used' runs/killed/train.log 2>/dev/null; then
        fail "a published checkpoint was found damaged"
    fi

    if [ "$code" = 0 ]; then
        rounds=$((rounds + 1))
        same_end killed || { cat difference; fail "the end differs"; }
        say "round $rounds: after $done_kills kills: $(tail -n 2 difference | paste -sd';')"
        [ $done_kills -lt "$kills" ] || break
        rm -rf runs/killed
        expected=-1
        continue
    fi
    [ "$code" = 137 ] || fail "exit code $code; a killed job gives 137"
    done_kills=$((done_kills + 1))
    at_point[$target]=$((${at_point[$target]:-0} + 1))
    tmp=$(find runs/killed/checkpoints -maxdepth 1 -name '.step-*.tmp-*' 2>/dev/null | wc -l || true)
    [ "$tmp" = 0 ] || during_save=$((during_save + 1))
    say "kill $done_kills at $target ($ranks ranks): newest checkpoint step $last$([ "$tmp" = 0 ] || echo ", an unfinished one beside it")"
    expected=$last
done
say "$done_kills kills, $during_save with a save under way, $n_resumes resumes from a checkpoint, $rounds rounds to the end"
for p in time "${points[@]}"; do say "  $p: ${at_point[$p]:-0}"; done
[ "$kills" -lt 10 ] || [ "${at_point[time]:-0}" -gt 0 ] || fail "none of the kills came at a random time"
if [ $mixed = 0 ]; then
    say "no checkpoint lost; every end equal to the undisturbed run, bit for bit"
else
    say "no checkpoint lost; every end equal to the undisturbed run in content and order, in numbers but for rounding"
fi
