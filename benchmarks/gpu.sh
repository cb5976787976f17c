#!/usr/bin/env bash
# All measurements and tests of this library that need a GPU, in one command and within nine minutes:
#
#     benchmarks/gpu.sh OUTDIR
#
# Builds the library against the installed torch. Then, in this order: whether everything is right (the GPU tests, and
# compute-sanitizer over every kernel), the five measurements on which most depends, the kernel and training suites, the
# tiles of the Triton kernels, the profile of the training loop and the scaling suite. Writes rows, traces and a log of
# each step to OUTDIR and prints which steps passed, failed, ran out of time or were skipped, and why. Needs no network;
# the suites need the package's dependencies (pip install .).
#
# PYTHON names the interpreter (python3), ANOMEM_COMMIT the commit if there is no git repository, SECONDS_IN_ALL the time
# limit (540). Exit status: 0 if the build, the tests and the kernels' numbers are right, 1 if one of them is wrong, 2 if
# torch or a CUDA device is missing.
set -u

if [ $# -ne 1 ]; then
  echo "usage: benchmarks/gpu.sh OUTDIR" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
limit=${SECONDS_IN_ALL:-540}
began=$SECONDS
failed=0
: >"$out/summary.txt"

tell() { echo "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: runs the command with a time limit, its output in NAME.log; 0 if it succeeded, 124 if
# it ran out of time or no time was left to start it.
step() {
  local name=$1 seconds=$2 left status from
  shift 2
  left=$((limit - SECONDS + began))
  if [ "$left" -lt 10 ]; then
    tell "$name: skipped, no time is left of $limit s"
    return 124
  fi
  [ "$seconds" -gt "$left" ] && seconds=$left
  from=$SECONDS
  timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) tell "$name: passed in $((SECONDS - from)) s" ;;
    124 | 137) tell "$name: stopped after $seconds s; rows measured until then are kept" ;;
    *) tell "$name: FAILED with status $status after $((SECONDS - from)) s; the end of $name.log:" ;;
  esac
  [ $status -ne 0 ] && tail -n 15 "$out/$name.log" | tee -a "$out/summary.txt"
  return $status
}

# must NAME ...: a step whose failure is the script's; running out of time is not a failure.
must() {
  step "$@"
  local status=$?
  case $status in 0 | 124 | 137) ;; *) failed=1 ;; esac
  return $status
}

# racecheck IMPL: also runs the kernels of cuBLAS and torch, for which it is known to report races that are none. Only a
# race in a kernel of this library is a failure.
racecheck() {
  local name=racecheck_$1
  step "$name" 30 "$sanitizer" --tool racecheck "$python" -m benchmarks.touch --device cuda --impl "$1" || return
  grep -E 'Race reported|hazard detected' "$out/$name.log" | grep -E "$ours" >"$out/$name.races"
  if [ -s "$out/$name.races" ]; then
    failed=1
    tell "$name: FAILED, races in kernels of this library:"
    head -n 5 "$out/$name.races" | tee -a "$out/summary.txt"
  fi
}
# Names of this library's kernels: the CUDA module's namespace, and the Triton kernels.
ours='anomem|(contrast|retrieve|row)_[a-z_]*_kernel'

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

missing=
for module in rich tyro torchvision; do
  has $module || missing="$missing $module"
done
[ -z "$missing" ] || tell "${missing# } is not installed: no suite, profile or sanitizer will run"
for module in matplotlib pytorch_metric_learning; do
  has $module || tell "$module is not installed"
done
if ! "$python" -c 'import torch' 2>"$out/torch.log"; then
  tell "$python cannot import torch (torch.log has the reason): nothing can be built or measured"
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  for name in build tests memcheck racecheck first kernels training tiles profile scaling compiled; do
    tell "$name: skipped, torch finds no CUDA device"
  done
  exit 2
fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw --format=csv >"$out/gpu.csv" 2>&1 ||
  tell "nvidia-smi did not answer: no clocks in gpu.csv"

capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
ANOMEM_BUILD=auto must build 150 "$python" setup.py build_ext --inplace
if ! ls anomem/_C_cuda*.so >"$out/libraries.txt" 2>&1; then
  tell "the CUDA module was not built; build.log says why. Native rows will be missing"
fi

if has pytest; then
  # Only the files with GPU tests, without --strict-config: the others need packages that may be missing.
  mapfile -t files < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py')
  must tests 100 "$python" -m pytest -q -m gpu -p no:cacheprovider \
    -o addopts='--strict-markers --import-mode=importlib' "${files[@]}"
else
  tell "tests: skipped, pytest is not installed"
fi

sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
if [ -n "$missing" ]; then
  tell "memcheck, racecheck, first, kernels, training, tiles, profile, scaling, compiled: skipped,$missing not installed"
  tell "done in $((SECONDS - began)) s; everything is in OUTDIR"
  exit $failed
fi
if [ -z "$sanitizer" ]; then
  tell "memcheck, racecheck: skipped, compute-sanitizer was not found on PATH or in CUDA_HOME"
else
  implementations=
  ls anomem/_C_cuda*.so >/dev/null 2>&1 && implementations=native || tell "memcheck native: skipped, no CUDA module"
  has triton && implementations="$implementations triton" || tell "memcheck triton: skipped, triton is not installed"
  # torch's caching allocator hides overruns inside its blocks; without it each tensor has its own allocation.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for impl in $implementations; do
    must "memcheck_$impl" 30 "$sanitizer" --tool memcheck --error-exitcode 9 \
      "$python" -m benchmarks.touch --device cuda --impl "$impl"
    racecheck "$impl"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi

# Suites skip the cases whose rows a file has, so what is measured first is not measured again.
measure=("$python" -m benchmarks.run --device cuda)
kernels=("${measure[@]}" --suite kernels --json "$out/cuda-kernels.jsonl")
# A contrast in training, retrieval in training, large retrieval, a contrast of long rows, and one of float32.
number=0
for filter in 'nt_xent G=8 B=1024 d=128' 'resnet18 scale 1' 'N=1048576' 'nt_xent G=4 B=8192 d=256' \
  'nt_xent G=16 B=1024 d=128 float32'; do
  number=$((number + 1))
  must "first_$number" 20 "${kernels[@]}" --no-compile --filter "$filter"
done
must kernels 120 "${kernels[@]}" --no-compile
must training 45 "${measure[@]}" --suite training --json "$out/cuda-training.jsonl" --no-compile
if has triton; then
  # The schemes and the table's own tiles; their neighbours would take the time of the whole script.
  must tiles 75 "$python" -m benchmarks.tune --json "$out/cuda-tiles.jsonl" --no-neighbours
else
  tell "tiles: skipped, triton is not installed"
fi
step profile 60 "$python" -m benchmarks.profile_training --device cuda --backbone resnet18 \
  --json "$out/cuda-steps.jsonl" --out "$out/profile"
step scaling 90 "${measure[@]}" --suite scaling --json "$out/cuda-scaling.jsonl" --no-compile
step compiled 120 "${measure[@]}" --suite kernels --json "$out/cuda-kernels.jsonl" --compile

# Traces over 8 MiB are deleted, so that OUTDIR stays small.
find "$out/profile" -name '*.json.gz' -size +8M -print -delete 2>/dev/null | while read -r trace; do
  tell "$trace: over 8 MiB, deleted"
done
tell "done in $((SECONDS - began)) s; everything is in OUTDIR"
exit $failed
