#!/usr/bin/env bash
# lm-evaluation-harness (local-completions) against hybridserve, on a task of its own that needs no download:
#   lm_eval.sh BASE_URL PYTHON
# Checked: the harness scores every choice; choosing the likeliest ending by hand over /v1/completions gives the same accuracy.
set -euo pipefail
base=$1 python=$2
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here"/lm_eval_task/*.yaml "$work/"
sed -i "s|@FOLDER@|$work|" "$work"/*.yaml
"$python" - "$work/choice.jsonl" <<'END'
import json, random, sys
r = random.Random(1)
words = "file name user option command output error system default format print value line process path shell".split()
with open(sys.argv[1], "w") as f:
    for i in range(40):
        a, b, c = r.sample(words, 3)
        f.write(json.dumps({"question": f"The {a} is a {b}. The {a} is a", "choices": [b, c, a + a], "answer": 0}) + "\n")
END
model=$(curl -s "$base/v1/models" | "$python" -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
export OPENAI_API_KEY=${OPENAI_API_KEY:-none} HF_DATASETS_OFFLINE=1
"$python" -m lm_eval run --model local-completions --tasks hybrid_choice,hybrid_text --include_path "$work" --output_path "$work/out" \
    --log_samples --model_args "model=$model,base_url=$base/v1/completions,num_concurrent=4,max_retries=3,tokenizer_backend=remote,tokenized_requests=True"
"$python" - "$base" "$model" "$work" <<'END'
import glob, json, sys, urllib.request
base, model, work = sys.argv[1:]
def ask(path, body):
    r = urllib.request.Request(base + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(r))
def score(context, ending):
    n = len(ask("/tokenize", {"prompt": context, "add_special_tokens": False})["tokens"])
    ids = ask("/tokenize", {"prompt": context + ending, "add_special_tokens": False})["tokens"]
    l = ask("/v1/completions", {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True})
    return sum(l["choices"][0]["logprobs"]["token_logprobs"][n:-1])
docs = [json.loads(line) for line in open(work + "/choice.jsonl")]
right = 0
for d in docs:
    s = [score(d["question"], " " + c) for c in d["choices"]]
    right += s.index(max(s)) == d["answer"]
results = json.load(open(glob.glob(work + "/out/**/results*.json", recursive=True)[0]))["results"]["hybrid_choice"]
print("by hand", right / len(docs), "lm_eval", results["acc,none"])
assert abs(right / len(docs) - results["acc,none"]) < 1e-9
END
echo "all right"
