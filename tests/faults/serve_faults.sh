#!/usr/bin/env bash
# hybridserve among good and bad clients (serve_load.c): every answer that is waited for is the one the request gets alone, and when
# all have gone nothing is left: no running request, no slot, no growing memory, no descriptor.
#   serve_faults.sh --bin DIR --tests DIR [--clients N] [--requests N] [--seed N]     long form: --clients 256 --requests 10000
set -euo pipefail
clients=24 requests=240 seed=$RANDOM
while [ $# -gt 1 ]; do
    case $1 in
    --bin) bin=$2 ;;
    --tests) tests=$2 ;;
    --clients) clients=$2 ;;
    --requests) requests=$2 ;;
    --seed) seed=$2 ;;
    esac
    shift 2
done
echo "clients $clients, requests $requests, seed $seed"
. "$(dirname "$0")/../programs/common.sh" "$bin" "$(cd "$(dirname "$0")/../.." && pwd)"
pid=
trap 'kill -9 ${pid:-} 2>/dev/null || true; rm -rf "$work"' EXIT
make_data
expect 0 train 1 faults train.steps=10 data.seq_len=256
"$bin/hybridserve" --model runs/faults --port 0 --threads 1 --max-num-seqs 8 --max-model-len 128 --log-level warn \
    --request-timeout 5 >serve.out 2>serve.log &
pid=$!
for _ in $(seq 600); do
    base=$(sed -n 's/^listening on //p' serve.out)
    [ -n "$base" ] && [ "$(curl -s -o /dev/null -w '%{http_code}' "$base/health")" = 200 ] && break
    sleep 0.1
done
port=${base##*:}
metric() { curl -s "$base/metrics" | awk -v n="$1" '$1 == n { print $2 }'; }
rss() { awk '/VmRSS/ { print $2 }' /proc/$pid/status; }
settle() {
    for _ in $(seq 300); do
        [ "$(metric hybridtrain_requests_running)" = 0 ] && [ "$(metric hybridtrain_requests_waiting)" = 0 ] &&
            [ "$(metric hybridtrain_connections)" -le 2 ] && return
        sleep 0.1
    done
    fail "stuck: $(curl -s "$base/metrics" | grep -E 'running|waiting|connections ')"
}
"$tests/serve_load" "$port" "$clients" $((requests / 4)) "$seed" || fail "wrong answers (warm-up)"
settle
before=$(rss) open=$(ls /proc/$pid/fd | wc -l)
"$tests/serve_load" "$port" "$clients" "$requests" $((seed + 1)) || fail "wrong answers"
settle
after=$(rss) left=$(ls /proc/$pid/fd | wc -l)
echo "resident $before -> $after kB, descriptors $open -> $left"
awk -v a="$before" -v b="$after" 'BEGIN { exit !(b < a * 1.1 + 8192) }' || [ -n "${HT_SANITIZE:-}" ] || fail "memory grew"
[ "$left" -le $((open + 2)) ] || fail "descriptors are left open"
[ "$(metric hybridtrain_state_cache_usage_ratio)" = 0 ] || [ "$(metric hybridtrain_prefix_cache_bytes)" != 0 ] ||
    fail "state slots are still taken"
code=0
kill -TERM $pid
wait $pid || code=$?
pid=
[ "$code" -eq 0 ] || fail "exit code $code after SIGTERM: $(tail -n 3 serve.log)"
echo "all right"
