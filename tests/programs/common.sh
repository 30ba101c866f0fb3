# Shared by the program tests: $bin, $work (a fresh folder, removed at the end), helpers. Sourced, not run.
set -euo pipefail
bin=$1
source_dir=$2
tests=$(dirname "$bin")/tests
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
cd "$work"

fail() { echo "FAILED: $*" >&2; exit 1; }
# expect CODE COMMAND...: runs it, output in $work/out, checks the exit code
expect() {
    local want=$1 got=0
    shift
    "$@" >out 2>&1 || got=$?
    [ "$got" -eq "$want" ] || { cat out >&2; fail "exit code $got instead of $want: $*"; }
}
says() { grep -qF -- "$1" out || { cat out >&2; fail "the output does not say: $1"; }; }

# A tokenizer and shards from the project's own documents.
make_data() {
    mkdir -p corpus
    cp "$source_dir"/docs/*.md "$source_dir"/LICENSE "$source_dir"/core/*/*.c corpus/
    : >corpus/empty.txt
    expect 0 "$bin/hybriddata" train-tokenizer --vocab 320 --special '<|end|>' --out tokenizer.json corpus
    expect 0 "$bin/hybriddata" tokenize --tokenizer tokenizer.json --eos '<|end|>' --out train.h5 corpus
    expect 0 "$bin/hybriddata" info train.h5
    says 'all checksums right'
}

# train RANKS NAME [overrides]: debug_tiny on that data. In the background call it with exec=exec, so that $! is
# mpirun itself and signals reach it.
train() {
    local ranks=$1 name=$2
    shift 2
    ${exec:-} mpirun -n "$ranks" --oversubscribe "$bin/hybridtrain" "$source_dir/recipes/debug_tiny.cfg" \
        model.vocab_size=320 data.train=train.h5 data.eval=train.h5 data.tokenizer=tokenizer.json parallel.device=cpu \
        train.micro_batch=1 eval.max_tokens=2048 "train.name=$name" "$@"
}
# "step loss" of every training line that counts
losses() {
    grep -v superseded "runs/$1/metrics.jsonl" | grep '"train/loss"' |
        sed 's/.*"step": *\([0-9]*\),.*"train\/loss": *\([^,}]*\).*/\1 \2/'
}
