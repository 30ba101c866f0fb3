#!/usr/bin/env bash
# scripts/gpu_check and scripts/gpu_status without a GPU: a driver, a sanitizer and a PyTorch that are stubs, the
# emulated benchmark in the place of the real one. What is built is checked elsewhere; here: which steps run, that a
# failure is told and ends with 1, what is written. Last, that the kernels alone are configured without any library.
# test_gpu_check.sh BENCH_GPU_KERNELS_EMU SOURCE_DIR
set -euo pipefail
bench=$1
source_dir=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "FAILED: $*" >&2; cat "$work/out" >&2; exit 1; }
says() { grep -qF -- "$1" "$work/out" || fail "the output does not say: $1"; }
wrote() { grep -qF -- "$2" "$work/tree/$1" || { cat "$work/tree/$1" >&2; fail "$1 does not say: $2"; }; }

mkdir -p "$work/tree/bench" "$work/tree/cmake" "$work/tree/docs" "$work/tree/tests/emu" "$work/stubs"
cp -r "$source_dir/scripts" "$work/tree/"
cp -r "$source_dir/bench/peers" "$work/tree/bench/"
cp "$source_dir/cmake/kernel_budget.txt" "$work/tree/cmake/"
printf 'echo "largest relative difference of the loss: 1e-6, at most 1e-3"; echo "all right"\n' >"$work/tree/tests/emu/test_train_gpu.sh"
stub() { # NAME, its text on stdin
    { echo '#!/usr/bin/env bash'; cat; } >"$work/stubs/$1"
    chmod +x "$work/stubs/$1"
}
stub nvidia-smi <<'TEXT'
case "$*" in
    *compute_cap*) echo "$STUB_CAPABILITY" ;;
    *) echo "Stub GPU 80GB" ;;
esac
TEXT
stub compute-sanitizer <<'TEXT'
[[ "$*" == *racecheck*"$STUB_RACE" && -n "$STUB_RACE" ]] && { echo "========= Race reported"; exit 9; }
exec "${@: -1}"
TEXT
stub stub_python <<'TEXT'
case "$*" in
    -c*) ;;
    *kernels*) printf 'rmsnorm forward\t7.0\tslow\nrmsnorm forward\t5.0\tquick\n' ;;
    *'slice --rows 2'*) exit 1 ;;
    *) echo '{"peer": "stub"}' ;;
esac
TEXT
# the build: suites that pass or fail as told, and the emulated benchmark with a clock
stub cmake <<'TEXT'
echo "$*" >>"$STUB_CMAKE_LOG"
[[ "$*" == *HT_KERNELS_ONLY* || "$1" = --build || "$STUB_LIBRARIES" = yes ]] || { echo "-- Could NOT find MPI_C"; exit 1; }
[ "$1" = --build ] || exit 0
mkdir -p "$2/tests" "$2/bin"
for suite in test_rows_cuda test_flash_cuda; do
    printf '#!/bin/sh\n[ "$STUB_BAD" != %s ] || { echo "x.c:1:F:core:forward:0: off by 3"; exit 1; }\n' $suite >"$2/tests/${suite}_gpu"
done
printf '#!/usr/bin/env bash\nset -o pipefail\n%s 70 "$2" "$3" | awk -F"\\t" -v OFS="\\t" "{ \\$4 = 10; print }"\n' "$STUB_BENCH" >"$2/bin/bench_gpu_kernels"
printf '#!/bin/sh\necho "{\\"mfu_pass\\": 0.5, \\"arguments\\": \\"$*\\"}"\n' >"$2/bin/bench_gpu_slice"
chmod +x "$2"/tests/* "$2"/bin/*
TEXT
real_cmake=$(command -v cmake)
export PATH="$work/stubs:$PATH" STUB_CAPABILITY=8.0 STUB_RACE='' STUB_BAD='' STUB_LIBRARIES='' STUB_BENCH=$bench
export STUB_CMAKE_LOG=$work/cmake.log HT_PEER_PYTHON=stub_python
check() { # EXIT_CODE [ARGUMENTS]: gpu_check in the tree
    local want=$1 got=0
    shift
    : >"$STUB_CMAKE_LOG"
    bash "$work/tree/scripts/gpu_check" "$@" >"$work/out" 2>&1 || got=$?
    [ $got -eq "$want" ] || fail "exit code $got instead of $want"
}
results=bench/results/stub-gpu-80gb

check 0 # everything, without the whole project's libraries
says 'passed racecheck test_rows_cuda_gpu'
says 'not run: Could NOT find MPI_C'
says 'all passed'
grep -q 'HT_CUDA_ARCHITECTURES=80-real' "$STUB_CMAKE_LOG" || fail "not built for sm_80"
wrote $results/suites.txt 'passed test_flash_cuda_gpu'
wrote $results/sanitizer.txt 'passed memcheck test_flash_cuda_gpu'
wrote $results/kernels.tsv 'quick: 5.0 us, 0.50 times ours' # the fastest peer, beside our 10 us
wrote $results/kernels_8192.tsv 'ssd_forward_kernel'
wrote $results/slice.jsonl '--fp8'
wrote $results/peers_slice.jsonl stub # after the larger batch failed
wrote docs/gpu-status.md '## stub-gpu-80gb'
wrote docs/gpu-status.md 'suites: 2 passed, 0 failed'
wrote docs/gpu-status.md 'quick: 5.0 us'
grep -E '^\| `ssd_step_kernel`.*stub-gpu-80gb.*10 us' "$work/tree/docs/gpu-status.md" >/dev/null || fail "no time of ssd_step_kernel"
if grep -q 'no kernel has run' "$work/tree/docs/gpu-status.md"; then fail "the page says that nothing has run"; fi
bash "$work/tree/scripts/gpu_status" --check >"$work/out" 2>&1 || fail "the page is not what would be written"

STUB_CAPABILITY=9.0 STUB_LIBRARIES=yes check 0 # Hopper, with all libraries
grep -q 'HT_CUDA_ARCHITECTURES=90a-real' "$STUB_CMAKE_LOG" || fail "not built for sm_90a"
wrote $results/suites.txt 'passed test_flash_cuda_gpu with HT_FLASH_SM90=1'
wrote $results/kernels.tsv flash_forward_sm90_kernel
wrote $results/train.txt 'all right'
wrote docs/gpu-status.md 'train: 1 passed, 0 failed; largest relative difference'

STUB_BAD=test_rows_cuda check 1 build-x suites # one step; a broken suite
says 'FAILED test_rows_cuda_gpu'
says 'off by 3'
wrote docs/gpu-status.md 'suites: 1 passed, 1 failed'
if grep -q racecheck "$work/out"; then fail "a step that was not asked for ran"; fi
STUB_RACE=test_flash_cuda_gpu check 1 build-x sanitize # a race
says 'FAILED racecheck test_flash_cuda_gpu'
says 'Race reported'
STUB_BENCH=/nonexistent check 1 build-y times # a benchmark that does not run
says 'failed: bench_gpu_kernels 4096'
check 2 build-x nonsense
says 'no step "nonsense"'

# the kernels need no library of the project's: neither MPI nor pkg-config is even asked for
"$real_cmake" -S "$source_dir" -B "$work/bare" -DHT_KERNELS_ONLY=ON -DHT_WITH_CUDA=OFF -DCMAKE_DISABLE_FIND_PACKAGE_MPI=ON \
    -DCMAKE_DISABLE_FIND_PACKAGE_PkgConfig=ON >"$work/out" 2>&1 || fail "the kernels alone cannot be configured"
[ -f "$work/bare/tests/emu/CTestTestfile.cmake" ] || fail "no suites in the bare build"
echo "all right"
