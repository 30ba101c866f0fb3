#!/usr/bin/env bash
# A disk that is full in the middle of a save: with checkpoint.on_full = "pause" the run waits, also when it is asked to
# stop meanwhile, and goes on when there is room; with "stop" it ends with exit code 5. Nothing is lost either way, and
# the end is that of an undisturbed run, bit for bit.
#
#   full_disk.sh [--bin DIR] [--tests DIR]      exit code 77 where no file system may be mounted
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bin=$here/../../build/bin
tests=$here/../../build/tests
arguments=("$@")
while [ $# -gt 0 ]; do
    case $1 in
    --bin) bin=$2; shift ;;
    --tests) tests=$2; shift ;;
    *) sed -n '2,6p' "$0"; exit 2 ;;
    esac
    shift
done
if [ -z "${HT_OWN_MOUNTS:-}" ]; then # mounts that nobody else sees and that end with this process
    unshare -rm true 2>/dev/null || { echo "SKIPPED: no file system may be mounted here"; exit 77; }
    HT_OWN_MOUNTS=1 exec unshare -rm bash "$0" "${arguments[@]}"
fi
bin=$(cd "$bin" && pwd)
tests=$(cd "$tests" && pwd)
export OMP_NUM_THREADS=1
work=$(mktemp -d "${TMPDIR:-/tmp}/ht-full-XXXXXX")
trap 'cd /; umount "$work/disk" 2>/dev/null; rm -rf "$work"' EXIT
cd "$work"
mkdir disk
mount -t tmpfs -o size=8m none disk 2>/dev/null || { echo "SKIPPED: no file system may be mounted here"; exit 77; }
job=0

fail() {
    echo "FAILED: $*"
    tail -n 20 output
    kill -KILL "$job" 2>/dev/null || true
    exit 1
}
# start ON_FULL POINT: one rank, in the background
start() {
    HT_TRAIN_PAUSE_AT=$2 "$bin/hybridtrain" "$here/kill.cfg" "data.train=$work/kill-data.h5" train.out_dir=disk \
        train.name=run train.steps=8 "checkpoint.on_full=$1" >output 2>&1 &
    job=$!
}
wait_until() { # CONDITION: 30 s at most
    for ((i = 0; i < 600; i++)); do
        if eval "$1"; then return; fi
        kill -0 "$job" 2>/dev/null || fail "the run ended while waiting for: $1"
        sleep 0.05
    done
    fail "30 s without: $1"
}
expect_end() { # CODE
    local code=0
    for ((i = 0; i < 600; i++)); do
        kill -0 "$job" 2>/dev/null || break
        sleep 0.05
    done
    [ "$i" -lt 600 ] || fail "still running after 30 s"
    wait "$job" || code=$?
    [ "$code" = "$1" ] || fail "exit code $code instead of $1"
}
# The disk becomes full while the third checkpoint is being written.
fill_during_save() {
    start "$1" save:3
    wait_until 'grep -q "^State:.T" "/proc/$job/status"'
    dd if=/dev/zero of=disk/filler bs=64k 2>/dev/null && fail "the disk cannot be filled"
    kill -CONT "$job"
}
same_end() {
    expect_end 0
    "$tests/ckpt_diff" undisturbed/step-00000008 disk/run/checkpoints/step-00000008 >difference || { cat difference; fail "$1: the end differs"; }
    echo "$1: $(cat difference)"
    rm -rf disk/run
}

"$tests/kill_data" kill-data.h5
start stop ""
expect_end 0
mkdir undisturbed
cp -r disk/run/checkpoints/step-00000008 undisturbed/
rm -rf disk/run

fill_during_save pause
wait_until 'grep -q "disk full, .*waiting for space" output'
sleep 0.5
kill -0 "$job" || fail "the run did not wait"
rm disk/filler
same_end "waited for space"

fill_during_save pause
wait_until 'grep -q "disk full, .*waiting for space" output'
kill -USR1 "$job"
sleep 0.5
kill -0 "$job" || fail "the run did not wait"
rm disk/filler
expect_end 75
grep -q 'stopped on SIGUSR1; checkpoint of step' output || fail "the stop was not said"
start pause ""
same_end "waited for space, then stopped on request"

fill_during_save stop
expect_end 5
grep -q 'bytes are needed, .* are free; earlier checkpoints are intact' output || fail "the full disk was not said"
[ -d disk/run/checkpoints/step-00000002 ] || fail "an earlier checkpoint is gone"
[ ! -d disk/run/checkpoints/step-00000003 ] || fail "there is a checkpoint that was not written"
rm disk/filler
start stop ""
same_end "ended with 5, then resumed"
