#!/usr/bin/env bash
# The launch files of recipes/, with a stand-in for Slurm: they pass signals and exit codes on, requeue what is worth
# it, and what they requeue goes on. test_launch.sh BIN_DIR SOURCE_DIR
source "$(dirname "$0")/common.sh"

slurm=$source_dir/recipes/slurm/train.sbatch
plain=$source_dir/recipes/mpirun/train.sh
bash -n "$slurm" && bash -n "$plain"
grep -q '^#SBATCH --signal=B:USR1@' "$slurm" || fail "Slurm would not warn the script"

make_data
mkdir -p path
cat >path/scontrol <<'EOF'
#!/bin/sh
echo "$@" >>requeued
EOF
real=$(command -v mpirun)
# on one host with few cores, as whoever runs the tests
cat >path/mpirun <<EOF
#!/bin/sh
exec "$real" --oversubscribe --allow-run-as-root "\$@"
EOF
chmod +x path/*
export PATH=$work/path:$PATH HYBRIDTRAIN=$bin/hybridtrain
export OMPI_MCA_odls_base_sigkill_timeout=1
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_JOB_ID=4711
tiny() { # NAME [overrides]
    printf '%s\n' "$source_dir/recipes/debug_tiny.cfg" model.vocab_size=320 data.train=train.h5 \
        data.tokenizer=tokenizer.json train.micro_batch=1 eval.every_steps=0 checkpoint.every_steps=50 "train.name=$1"
}

# a whole run
mapfile -t args < <(tiny whole)
expect 0 "$slurm" "${args[@]}" train.steps=4
says "exit code 0: done"
[ ! -e requeued ] || fail "a finished run was requeued"

# stopped by each signal in the middle: a checkpoint, 75, and the queue again where Slurm does not do it itself
stop() { # SIGNAL NAME SCRIPT [args]
    local signal=$1 name=$2 got=0
    shift 2
    mapfile -t args < <(tiny "$name")
    "$@" "${args[@]}" train.steps=2000 >out 2>&1 &
    local job=$!
    for _ in $(seq 600); do [ -s "runs/$name/metrics.jsonl" ] && break; sleep 0.1; done
    kill "-$signal" $job
    wait $job || got=$?
    [ $got = 75 ] || { cat out; fail "$signal: exit code $got instead of 75"; }
    says "start again to go on"
}
stop USR1 warned "$slurm"
says "exit code 75: stopped with a checkpoint"
[ "$(cat requeued)" = "requeue 4711" ] || fail "not requeued"
rm requeued
stop TERM cancelled "$slurm"
says "not requeued from here"
[ ! -e requeued ] || fail "a cancelled run was requeued"

# the requeued job goes on
mapfile -t args < <(tiny warned)
SLURM_RESTART_COUNT=1 SLURM_NTASKS=1 "$slurm" "${args[@]}" train.steps=2000 >out 2>&1 &
job=$!
for _ in $(seq 600); do grep -q 'resumed from' out && break; sleep 0.1; done
kill -USR1 $job
wait $job || true
says "resumed from"
says "start 2"
rm -f requeued

# errors that a restart does not cure end the job; a lost rank does not
expect 2 "$slurm" "$source_dir/recipes/debug_tiny.cfg" train.micro_batch=7
says "exit code 2: not requeued"
[ ! -e requeued ] || fail "a wrong recipe was requeued"
printf '#!/bin/sh\nexit 6\n' >lost
chmod +x lost
HYBRIDTRAIN=$work/lost expect 6 "$slurm" any.cfg
says "a rank or a collective was lost"
[ "$(cat requeued)" = "requeue 4711" ] || fail "a lost rank: not requeued"
rm requeued
SLURM_RESTART_COUNT=5 HYBRIDTRAIN=$work/lost expect 6 "$slurm" any.cfg
says "failed again after 5 restarts"
[ ! -e requeued ] || fail "requeued for ever"
expect 2 "$slurm"
(unset SLURM_NTASKS; "$slurm" any.cfg >out 2>&1) && fail "started without Slurm"
says "start this with sbatch"

# without a scheduler
echo "localhost slots=2 # this one" >hosts
mapfile -t args < <(tiny plain)
expect 0 "$plain" hosts "${args[@]}" train.steps=4
says "2 rank(s)"
stop USR1 plainstop "$plain" hosts
HT_MAX_FAILURES=2 HT_RESTART_PAUSE_S=0 HYBRIDTRAIN=$work/lost expect 6 "$plain" hosts any.cfg
[ "$(grep -c 'a rank or a collective was lost' out)" = 2 ] || fail "not started three times"
: >nobody
expect 2 "$plain" nobody any.cfg
says "no hosts"
expect 2 "$plain" hosts
"$bin/hybridtrain" --version >/dev/null
echo "all right"
