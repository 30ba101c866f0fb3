#!/usr/bin/env bash
# Train a recipe on hosts without a scheduler: mpirun over ssh, started again after a lost rank (docs/cluster.md).
#
#   recipes/mpirun/train.sh HOSTFILE RECIPE [section.key=value ...]
#
# HOSTFILE as in hostfile.example; the program, the recipe and the data have the same paths on every host. Stop with
# kill -USR1 (or Ctrl-C, or SIGTERM): the run saves and ends with 75; the same command goes on. Exit codes are
# hybridtrain's; after 6 or 137 (a rank or a collective was lost) it starts again, at most HT_MAX_FAILURES times.
#
# Environment: HYBRIDTRAIN (the program; default: build/bin/hybridtrain, else from PATH), HT_MPIRUN_ARGS,
# HT_MAX_FAILURES (default 5).
set -uo pipefail
if [ $# -lt 2 ] || [ ! -r "$1" ]; then
    echo "usage: $0 HOSTFILE RECIPE [section.key=value ...]" >&2
    exit 2
fi
hostfile=$1
shift
program=${HYBRIDTRAIN:-build/bin/hybridtrain}
[ -x "$program" ] || program=hybridtrain
ranks=$(sed 's/#.*//' "$hostfile" | awk 'NF { n = 1; for (i = 2; i <= NF; i++) if (sub(/^slots=/, "", $i)) n = $i; sum += n }
    END { print sum + 0 }')
if [ "$ranks" -lt 1 ]; then
    echo "$hostfile: no hosts; lines are: name slots=8" >&2
    exit 2
fi
# Time between SIGTERM and SIGKILL for ranks when somebody sends mpirun SIGTERM. Also what mpirun waits at the end of a
# run with another exit code than 0, so not longer.
export OMPI_MCA_odls_base_sigkill_timeout=${OMPI_MCA_odls_base_sigkill_timeout:-15}

asked='' job=''
ask() {
    asked=yes
    [ -z "$job" ] || kill -USR1 "$job" 2>/dev/null
}
trap ask USR1 TERM INT

failures=0
while :; do
    code=0
    # a session of its own: Ctrl-C reaches this script alone, which asks politely
    # shellcheck disable=SC2086 # several arguments
    setsid mpirun --hostfile "$hostfile" -n "$ranks" --map-by slot --bind-to none ${HT_MPIRUN_ARGS:-} \
        "$program" "$@" &
    job=$!
    wait $job || code=$?
    while kill -0 $job 2>/dev/null; do # a trapped signal ends `wait` early
        code=0
        wait $job || code=$?
    done
    case $code in
    6 | 137) ;;
    *) break ;;
    esac
    failures=$((failures + 1))
    if [ -n "$asked" ] || [ $failures -gt "${HT_MAX_FAILURES:-5}" ]; then break; fi
    echo "exit code $code: a rank or a collective was lost (the reason is above); start $((failures + 1)) in 10 s"
    sleep "${HT_RESTART_PAUSE_S:-10}"
done
exit $code
