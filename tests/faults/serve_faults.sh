#!/usr/bin/env bash
# hybridserve among good and bad clients (serve_load.c): every answer that is waited for is the one the request gets alone or says why
# it is not, and when all have gone nothing is left: no running request, no slot, no keys and values, no growing memory, no descriptor.
#   serve_faults.sh --bin DIR --tests DIR [--clients N] [--requests N] [--seed N] [--seqs N] [--queue N]
# long form: --clients 256 --requests 10000 --seqs 256
set -euo pipefail
clients=24 requests=240 seed=$RANDOM seqs=8 queue=
while [ $# -gt 1 ]; do
    case $1 in
    --bin) bin=$2 ;;
    --tests) tests=$2 ;;
    --clients) clients=$2 ;;
    --requests) requests=$2 ;;
    --seed) seed=$2 ;;
    --seqs) seqs=$2 ;;
    --queue) queue=$2 ;;
    esac
    shift 2
done
echo "clients $clients, requests $requests, seed $seed"
. "$(dirname "$0")/../programs/common.sh" "$bin" "$(cd "$(dirname "$0")/../.." && pwd)"
pid= sampler=
trap 'kill -9 ${pid:-} ${sampler:-} 2>/dev/null || true; rm -rf "$work"' EXIT
make_data
expect 0 train 1 faults train.steps=10 data.seq_len=256
"$bin/hybridserve" --model runs/faults --port 0 --threads 1 --max-num-seqs "$seqs" --max-model-len 128 --log-level warn \
    --request-timeout 60 --max-body 256KiB ${queue:+--max-queue "$queue"} >serve.out 2>serve.log &
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
"$tests/serve_load" "$port" "$clients" $((requests / 4)) "$seed" >/dev/null || fail "wrong answers (warm-up)"
settle
before=$(rss) open=$(ls /proc/$pid/fd | wc -l)
while sleep 0.5; do # what the server holds while clients come and go
    echo "$(rss) $(metric hybridtrain_requests_running) $(metric hybridtrain_requests_waiting) $(metric hybridtrain_connections)"
done >samples &
sampler=$!
"$tests/serve_load" "$port" "$clients" "$requests" $((seed + 1)) || fail "wrong answers"
kill "$sampler"
sampler=
settle
after=$(rss) left=$(ls /proc/$pid/fd | wc -l)
echo "resident kB, sequences running, waiting, connections, at ten times of the run:"
awk '{ line[NR] = $0 } END { for (i = 1; i <= 10; i++) print "    " line[int((NR - 1) * (i - 1) / 9) + 1] }' samples
echo "resident $before kB after the warm-up, $after kB at the end; descriptors $open, $left"
curl -s "$base/metrics" | grep -E '^hybridtrain_(requests_total|rejected_total)' | sed 's/^/    /'
awk -v a="$before" -v b="$after" 'BEGIN { exit !(b < a * 1.05 + 4096) }' || [ -n "${HT_SANITIZE:-}" ] || fail "memory grew"
[ "$left" -le $((open + 2)) ] || fail "descriptors are left open"
[ "$(metric hybridtrain_state_cache_usage_ratio)" = 0 ] || fail "state slots are still taken"
[ "$(metric hybridtrain_kv_cache_usage_ratio)" = 0 ] || fail "keys and values are still held"
code=0
kill -TERM $pid
wait $pid || code=$?
pid=
[ "$code" -eq 0 ] || fail "exit code $code after SIGTERM: $(tail -n 3 serve.log)"
echo "all right"
