#!/usr/bin/env bash
# hybridserve on a small model, over curl: answers, streaming, scoring, chat, constraints, errors, keys, signals.
. "$(dirname "$0")/common.sh"
make_data
expect 0 train 1 serve train.steps=30 data.seq_len=256

# start [options]: $base is the server's address, $pid its process
start() {
    "$bin/hybridserve" --model runs/serve --port 0 --threads 1 --max-num-seqs 4 --max-model-len 256 "$@" >serve.out 2>serve.log &
    pid=$!
    for _ in $(seq 600); do
        base=$(sed -n 's/^listening on //p' serve.out)
        [ -n "$base" ] && [ "$(curl -s -o /dev/null -w '%{http_code}' "$base/health")" = 200 ] && return
        kill -0 $pid 2>/dev/null || break
        sleep 0.1
    done
    cat serve.log >&2
    fail "hybridserve did not start"
}
stop() { # SIGTERM ends it with 0
    local code=0
    kill -TERM $pid
    wait $pid || code=$?
    [ "$code" -eq 0 ] || { cat serve.log >&2; fail "exit code $code after SIGTERM"; }
}
trap 'kill -9 ${pid:-} 2>/dev/null || true; rm -rf "$work"' EXIT
# ask STATUS PATH [BODY]: answer in ./out
ask() {
    local got
    if [ $# -gt 2 ]; then
        got=$(curl -s -o out -w '%{http_code}' "${auth[@]}" -H 'Content-Type: application/json' -d "$3" "$base$2")
    else
        got=$(curl -s -o out -w '%{http_code}' "${auth[@]}" "$base$2")
    fi
    [ "$got" = "$1" ] || { cat out serve.log >&2; fail "$2 gives $got instead of $1: ${3:-}"; }
}
auth=()

expect 2 "$bin/hybridserve" --port 0
says '--model'
expect 2 "$bin/hybridserve" --model runs/serve --host 0.0.0.0
says 'api-key'
expect 2 "$bin/hybridserve" --model runs/serve --max-body 3x
says 'max-body'
expect 1 "$bin/hybridserve" --model nowhere --port 0
says nowhere

start
ask 200 /v1/models
says '"id":"serve"'
ask 200 /
says '<!doctype html>'
ask 200 /version

# greedy is what hybridgen makes
"$bin/hybridgen" --model runs/serve --prompt 'static int' --temperature 0 --n-predict 20 >gen.txt
ask 200 /v1/completions '{"prompt": "static int", "temperature": 0, "max_tokens": 20}'
says '"usage":{"prompt_tokens":'
text=$(sed 's/.*"text":"\(.*\)","logprobs".*/\1/' out)
[ "$(printf '%b' "${text//\\\"/\"}")" = "$(cat gen.txt)" ] || fail "hybridgen: $(cat gen.txt) hybridserve: $text"

# a seed gives the same again; streaming gives the same text in pieces
ask 200 /v1/completions '{"prompt": "static int", "seed": 7, "max_tokens": 20}'
sed 's/.*"text":\(".*"\),"logprobs".*/\1/' out >seed1
ask 200 /v1/completions '{"prompt": "static int", "seed": 7, "max_tokens": 20}'
sed 's/.*"text":\(".*"\),"logprobs".*/\1/' out >seed2
cmp seed1 seed2 || fail "a seed gives two texts"
ask 200 /v1/completions '{"prompt": "static int", "seed": 7, "max_tokens": 20, "stream": true, "stream_options": {"include_usage": true}}'
says 'data: [DONE]'
says '"completion_tokens":20'
{ printf '"'; sed -n 's/.*"text":"\(.*\)","logprobs".*/\1/p' out | tr -d '\n'; printf '"'; } >seed3
cmp seed1 seed3 || fail "streamed text differs"

# scoring: prompt + 1 entries, the first null, the chosen token is never above the best
ask 200 /v1/completions '{"prompt": [[1,2,3,4],[5,6]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": true, "seed": 1}'
says '"token_logprobs":[null,'
[ "$(grep -o '"token_logprobs":\[[^]]*\]' out | head -n 1 | tr -cd , | wc -c)" -eq 4 ] || fail "5 log-probabilities expected: $(cat out)"
ask 200 /v1/completions '{"prompt": [1,2,3], "n": 2, "best_of": 3, "max_tokens": 4}'
[ "$(grep -o '"index":' out | wc -l)" -eq 2 ] || fail "2 choices expected"

# tokens there and back
ask 200 /tokenize '{"prompt": "static int"}'
ids=$(sed 's/.*"tokens":\(\[.*\]\).*/\1/' out)
ask 200 /detokenize "{\"tokens\": $ids}"
says '"prompt":"static int"'
ask 200 /tokenizer_info

# JSON by construction, from a model that has never seen any
schema='{"type":"object","properties":{"n":{"type":"integer"},"c":{"enum":["red","green"]}},"required":["n","c"]}'
ask 200 /v1/completions "{\"prompt\": \"x\", \"temperature\": 1, \"seed\": 3, \"max_tokens\": 100, \"response_format\": {\"type\": \"json_schema\", \"json_schema\": {\"name\": \"s\", \"schema\": $schema}}}"
grep -qE '"text":"(\\n)?[ ]*\{.*\\"n\\":.*-?[0-9]+.*\\"c\\":.*\\"(red|green)\\".*\}","logprobs":null,"finish_reason":"stop"' out || fail "no JSON of the schema: $(cat out)"

# errors say what
ask 400 /v1/completions '{"prompt": "a", "temperature": 5}'
says '"param":"temperature"'
ask 400 /v1/completions '{"prompt": "a"'
ask 400 /v1/chat/completions '{"messages": [{"role": "user", "content": "hi"}]}'
says 'chat template'
ask 404 /nothing
ask 405 /v1/completions
long=$(printf 'word %.0s' $(seq 400))
ask 400 /v1/completions "{\"prompt\": \"$long\"}"
says context_length_exceeded
ask 200 /metrics
says 'hybridtrain_generation_tokens_total'
says 'hybridtrain_requests_total{finish_reason="length"}'

# a client that leaves is not worked for
curl -s -N -m 1 -d '{"prompt": "a", "max_tokens": 200, "ignore_eos": true, "n": 4, "stream": true}' "$base/v1/completions" >/dev/null &
client=$!
sleep 0.3
kill -9 $client 2>/dev/null || true
for _ in $(seq 100); do
    ask 200 /metrics
    grep -q '^hybridtrain_requests_running 0$' out && break
    sleep 0.1
done
grep -q '^hybridtrain_requests_running 0$' out || fail "still working: $(grep running out)"

# SIGTERM while an answer is made: it is finished first
curl -s -d '{"prompt": "a", "max_tokens": 200, "ignore_eos": true}' "$base/v1/completions" >last.txt &
client=$!
sleep 0.2
stop
wait $client || fail "the last answer was cut"
grep -q '"completion_tokens":200' last.txt || fail "the last answer is not whole: $(cat last.txt)"

# chat, keys, another server's metric names, several at once are what each gets alone
cat >chat.jinja <<'END'
{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}assistant:
END
echo secret-key >keys.txt
start --chat-template chat.jinja --api-key-file keys.txt --served-model-name tiny --metrics-prefix vllm: --no-chat-page --log-file server.log
ask 401 /v1/models
auth=(-H 'Authorization: Bearer secret-key')
ask 200 /v1/models
says '"id":"tiny"'
ask 404 /
ask 404 /v1/chat/completions '{"model": "other", "messages": [{"role": "user", "content": "hi"}]}'
for i in 1 2 3 4 5 6; do
    ask 200 /v1/chat/completions "{\"model\": \"tiny\", \"messages\": [{\"role\": \"user\", \"content\": \"number $i\"}], \"temperature\": 0, \"max_tokens\": 24}"
    sed 's/.*"message"//; s/"usage".*//' out >alone$i
done
clients=()
for i in 1 2 3 4 5 6; do
    curl -s "${auth[@]}" -d "{\"model\": \"tiny\", \"messages\": [{\"role\": \"user\", \"content\": \"number $i\"}], \"temperature\": 0, \"max_tokens\": 24}" "$base/v1/chat/completions" >together$i &
    clients+=($!)
done
wait "${clients[@]}"
for i in 1 2 3 4 5 6; do
    sed 's/.*"message"//; s/"usage".*//' together$i | cmp - alone$i || fail "answer $i depends on its neighbours"
done
ask 200 /metrics
says 'vllm:num_requests_running'
one='{"model": "tiny", "messages": [{"role": "user", "content": "rotate"}], "max_tokens": 2}'
mv server.log old.log # SIGHUP: the log goes on in a new file
kill -HUP "$pid"
for _ in $(seq 100); do [ -e server.log ] && break || sleep 0.1; done
ask 200 /v1/chat/completions "$one"
for _ in $(seq 50); do [ -s server.log ] && break || sleep 0.1; done
[ -s server.log ] || fail "nothing in the log after SIGHUP"
rm server.log
mkdir server.log # it cannot be opened: the server goes on
kill -HUP "$pid"
sleep 0.2
ask 200 /v1/chat/completions "$one"
grep -q secret-key serve.log old.log && fail "a key is in the log"
grep -q 'number 1' serve.log old.log && fail "a prompt is in the log"
stop
pid=
echo "all right"
