#!/usr/bin/env bash
# Ask a training run to stop by a signal in every phase, go on with the same command, and compare the end with an
# undisturbed run, bit for bit.
#
#   preempt.sh [--random N] [--ranks N] [--seed N] [--bin DIR] [--tests DIR] [--keep]
#
# One rank stops itself (SIGSTOP) at a named point (HT_TRAIN_PAUSE_AT, training/run.h), so that the signal arrives in
# that phase and not near it: it is sent to mpirun, which passes it on, or to that rank alone; then the rank goes on.
# With --random N, N more signals at random moments of a run. After each signal:
#   - the run ends by itself with exit code 75 (mpirun's own answer to SIGTERM is 1) and says at which step;
#   - no checkpoint is missing, none was written in vain, nothing half-written is left;
#   - the next start resumes from the newest one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
random=0 ranks=2 seed=1 keep=0
bin=$here/../../build/bin
tests=$here/../../build/tests
while [ $# -gt 0 ]; do
    case $1 in
    --random) random=$2; shift ;;
    --ranks) ranks=$2; shift ;;
    --seed) seed=$2; shift ;;
    --bin) bin=$2; shift ;;
    --tests) tests=$2; shift ;;
    --keep) keep=1 ;;
    *) sed -n '2,5p' "$0"; exit 2 ;;
    esac
    shift
done
bin=$(cd "$bin" && pwd)
tests=$(cd "$tests" && pwd)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
RANDOM=$seed
work=$(mktemp -d "${TMPDIR:-/tmp}/ht-preempt-XXXXXX")
[ $keep = 1 ] || trap 'rm -rf "$work"' EXIT
cd "$work"
job=0 n_steps=24

say() { printf '%s\n' "$*"; }
fail() {
    trap - EXIT # what is left may explain it
    say "FAILED: $phase: $* (files in $work)"
    say "--- the end of the output and of the log:"
    tail -n 20 output runs/stopped/train.log 2>/dev/null || true
    rank_pids | xargs -r kill -KILL 2>/dev/null || true
    kill -KILL "$job" 2>/dev/null || true
    exit 1
}

# start NAME POINT [mpirun's options]: job = mpirun's process. The last rank alone pauses at POINT ("" = none).
start() {
    local name=$1 point=$2 program
    shift 2
    program=("$bin/hybridtrain" "$here/kill.cfg" "data.train=$work/kill-data.h5" "data.eval=$work/kill-data.h5"
        train.out_dir=runs "train.name=$name" "train.steps=$n_steps" checkpoint.every_steps=6 checkpoint.keep_last=9
        eval.every_steps=8 eval.max_tokens=512)
    if [ -z "$point" ]; then
        mpirun "$@" -n "$ranks" --oversubscribe --bind-to none "${program[@]}" >>output 2>&1 &
    elif [ "$ranks" = 1 ]; then
        mpirun "$@" -n 1 --oversubscribe --bind-to none -x HT_TRAIN_PAUSE_AT="$point" "${program[@]}" >>output 2>&1 &
    else
        mpirun "$@" --oversubscribe --bind-to none -n $((ranks - 1)) "${program[@]}" : \
            -n 1 -x HT_TRAIN_PAUSE_AT="$point" "${program[@]}" >>output 2>&1 &
    fi
    job=$!
}
rank_pids() { pgrep -P "$job" -x hybridtrain || true; }
paused_pid() { pgrep -P "$job" -x hybridtrain -r T || true; }
wait_for_pause() { # paused = the rank that has stopped itself
    for ((i = 0; i < 600; i++)); do
        paused=$(paused_pid)
        [ -z "$paused" ] || return 0
        kill -0 "$job" 2>/dev/null || fail "the run ended before its pause"
        sleep 0.05
    done
    fail "no pause within 30 s"
}
# wait_for_signal NUMBER: it is there, waiting for the paused rank to go on
wait_for_signal() {
    local pending
    for ((i = 0; i < 600; i++)); do
        pending=$(sed -n 's/^ShdPnd:[[:space:]]*//p' "/proc/$paused/status")
        [ $((0x${pending:-0} >> ($1 - 1) & 1)) = 0 ] || return 0
        sleep 0.02
    done
    fail "the signal does not reach the rank"
}
# The job's exit code; a run that does not end is a failure.
end_of_job() {
    for ((i = 0; i < 600; i++)); do
        kill -0 "$job" 2>/dev/null || break
        sleep 0.05
    done
    [ "$i" -lt 600 ] || fail "still running 30 s after the signal"
    code=0
    wait "$job" || code=$?
}
steps() { # of the published checkpoints, on one line
    local d list=
    for d in runs/stopped/checkpoints/step-*/; do
        [ -d "$d" ] || continue
        d=${d%/}
        list="$list $((10#${d##*step-}))"
    done
    echo "${list# }"
}
no_rubbish() {
    local rubbish
    rubbish=$(find runs/stopped/checkpoints -maxdepth 1 -name '.step-*' 2>/dev/null || true)
    [ -z "$rubbish" ] || fail "left behind: $rubbish"
}
inode() { stat -c %i "runs/stopped/checkpoints/$(printf 'step-%08d' "$1")/manifest.json"; }

# interrupt PHASE POINT SIGNAL TARGET CODE STEPS SAYS [mpirun's options]: the signal to mpirun or to the rank that
# waits at POINT; expected are exit code, the checkpoints there afterwards, and a line of the output.
interrupt() {
    local point=$2 signal=$3 target=$4 want=$5 want_steps=$6 line=$7
    phase="$1, SIG$signal to $target"
    shift 7
    : >output
    start stopped "$point" "$@"
    wait_for_pause
    if [ "$target" = mpirun ]; then kill "-$signal" "$job"; else kill "-$signal" "$paused"; fi
    wait_for_signal "$(kill -l "$signal")" # mpirun passes it on
    kill -CONT "$paused"
    end_of_job
    [ "$code" = "$want" ] || fail "exit code $code instead of $want"
    grep -qF -- "$line" output || fail "the output does not say: $line"
    [ "$(steps)" = "$want_steps" ] || fail "checkpoints of steps $(steps); expected were $want_steps"
    no_rubbish
    say "$phase: exit code $code, checkpoints: ${want_steps:-none}"
}
# resume_to_end: the same command again; the end must be that of the undisturbed run
resume_to_end() {
    local from=$1 want_inode="" last
    phase="resume from ${from:-nothing}"
    last=$(printf 'step-%08d' "$n_steps")
    [ "$from" != "$n_steps" ] || want_inode=$(inode "$n_steps")
    : >output
    start stopped ""
    end_of_job
    [ "$code" = 0 ] || fail "exit code $code"
    [ -z "$from" ] || grep -q "resumed from .*: step $from," output || fail "not resumed from step $from"
    "$tests/ckpt_diff" "runs/undisturbed/checkpoints/$last" "runs/stopped/checkpoints/$last" >difference ||
        { cat difference; fail "the end differs from the undisturbed run's"; }
    [ "$(cat runs/stopped/checkpoints/LATEST)" = "$last" ] || fail "LATEST is $(cat runs/stopped/checkpoints/LATEST)"
    [ -z "$want_inode" ] || [ "$want_inode" = "$(inode "$n_steps")" ] || fail "$last was saved a second time"
    say "  $phase: $(cat difference)"
    rm -rf runs/stopped
}

# undisturbed: what the ends are compared with; full_ms is how long it takes
undisturbed() {
    local began
    phase="undisturbed run"
    rm -rf runs
    : >output
    began=$(date +%s%N)
    start undisturbed ""
    end_of_job
    [ "$code" = 0 ] || fail "exit code $code"
    full_ms=$((($(date +%s%N) - began) / 1000000))
    say "undisturbed run: $n_steps steps, $full_ms ms; $ranks ranks, seed $seed"
}

"$tests/kill_data" kill-data.h5
undisturbed

# before the first step: nothing is there, nothing is made
interrupt "opening data" data USR1 mpirun 75 "" "before the first step; there was nothing to save"
interrupt "opening data" data TERM rank 75 "" "before the first step; there was nothing to save"
# a step: with what it had under way
interrupt "first step" step:2 USR1 rank 75 "1" "SIGUSR1: stopping after step 1"
interrupt "load" load:2 USR1 mpirun 75 "1" "the checkpoint of step 1 is as it was"
interrupt "step" step:7 TERM rank 75 "1 5" "SIGTERM: stopping after step 5"
interrupt "save" save USR1 mpirun 75 "1 5 6" "SIGUSR1: stopping after step 6"
interrupt "evaluation" evaluate:2 USR1 mpirun 75 "1 5 6 8" "the evaluation at step 8 is cut short"
resume_to_end 8

interrupt "save" save:2 TERM rank 75 "6 12" "SIGTERM: stopping after step 12"
interrupt "load" load TERM rank 75 "6 12" "the checkpoint of step 12 is as it was"
interrupt "evaluation" evaluate TERM rank 75 "6 12 16" "the evaluation at step 16 is cut short"
interrupt "last evaluation" last-evaluate:2 USR1 mpirun 75 "6 12 16 18 24" "the evaluation at step 24 is cut short"
resume_to_end 24

# all is done but the waiting for the disk: the run is complete
interrupt "end" finish USR1 mpirun 0 "6 12 18 24" "done: 24 steps"
echo step-00000018 >runs/stopped/checkpoints/LATEST # as a kill between two renames leaves it
resume_to_end 24

# mpirun's answer to SIGTERM: SIGTERM to its ranks T seconds later, SIGKILL T seconds after that, exit code 1. The run is
# long enough to be at work for all that time; its next start goes on from where it was stopped.
phase="at work, SIGTERM to mpirun"
: >output
n_steps=30000
start stopped "" --mca odls_base_sigkill_timeout 3
for ((i = 0; i < 600; i++)); do
    [ ! -s runs/stopped/metrics.jsonl ] || break
    sleep 0.05
done
kill -TERM "$job"
end_of_job
[ "$code" = 1 ] || fail "exit code $code instead of mpirun's 1"
last=$(grep -o 'hybridtrain: stopped on SIGTERM; checkpoint of step .* saved' output) || fail "not stopped in time"
last=$(echo "$last" | grep -o 'step [0-9]*')
no_rubbish
say "$phase: exit code 1, checkpoint of $last"
: >output
start stopped step
wait_for_pause
kill -USR1 "$paused"
kill -CONT "$paused"
end_of_job
[ "$code" = 75 ] || fail "exit code $code instead of 75"
grep -q "resumed from .*: $last," output || fail "not resumed from $last"
say "  resumed from $last"
rm -rf runs/stopped
n_steps=24

# what a job script does (docs/checkpoints.md): its own SIGTERM becomes SIGUSR1 to mpirun
phase="job script, SIGTERM"
cat >job.sh <<'EOF'
trap 'kill -USR1 $job' USR1 TERM
"$@" &
job=$!
wait $job
code=$?
[ $code -le 128 ] || { wait $job; code=$?; } # the signal ended the first wait
exit $code
EOF
: >output
mpirun() { exec bash job.sh "$(type -P mpirun)" "$@"; }
start stopped step:20
unset -f mpirun
paused_pid() { pgrep -r T -f "^$bin/hybridtrain .*data.train=$work/" || true; } # the script's grandchild
wait_for_pause
kill -TERM "$job"
wait_for_signal "$(kill -l USR1)"
kill -CONT "$paused"
end_of_job
[ "$code" = 75 ] || fail "exit code $code instead of 75"
[ "$(steps)" = "6 10" ] || fail "checkpoints of steps $(steps); expected were 6 10"
say "$phase: exit code 75, checkpoints: $(steps)"
resume_to_end 10

# at random moments of a longer run
before=
if [ "$random" -gt 0 ]; then
    n_steps=480
    undisturbed
fi
for ((n = 1; n <= random; n++)); do
    phase="random signal $n"
    : >output
    start stopped ""
    ms=$((200 + RANDOM * (full_ms - 300) / 32768)) # the first tenths of a second are mpirun's own
    sleep "$(printf '%d.%03d' $((ms / 1000)) $((ms % 1000)))"
    [ $((RANDOM % 2)) = 0 ] && target=$job || target=$(rank_pids | shuf -n 1 --random-source=<(yes "$RANDOM"))
    kill -USR1 "${target:-$job}" 2>/dev/null || true
    end_of_job
    newest=$(steps)
    newest=${newest##* }
    [ "${newest:-0}" -ge "${before:-0}" ] || fail "newest checkpoint ${newest:-none}, before it was $before"
    no_rubbish
    ended=$(grep -o 'hybridtrain: stopped on .*\|done: .* steps' output || echo "before there were handlers")
    say "$phase: after $ms ms, exit code $code, newest checkpoint ${newest:-none}; ${ended#hybridtrain: }"
    before=$newest
    case $code in
    0) resume_to_end 480; before= ;;
    75) ;;
    138) ! grep -q 'resumed from\|step' output || fail "ended by the signal" ;;
    *) fail "exit code $code" ;;
    esac
done
if [ -d runs/stopped ]; then
    last=$(steps)
    resume_to_end "${last##* }"
fi
say "every end equal to the undisturbed run, bit for bit"
