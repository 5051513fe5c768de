#!/usr/bin/env bash
# All that is to be shown on a GPU: the tests on both GPU backends, compute-sanitizer, the benchmarks beside every peer
# that is installed, and two training runs. Needs a GPU, torch built for CUDA, nvcc and pytest; downloads nothing.
#
#   benchmarks/gpu_report.sh PART...        `all` for every part, in this order:
#
#     build                                 installs the extension; the other parts begin with it, cheap when it is there
#     doctor                                versions, and a first check of each backend
#     tests-triton tests-cuda sanitizer     tests/gpu
#     speed                                 steps at four widths against eager PyTorch, host time beside the whole
#     kernels-forward kernels-backward kernels-inference kernels-cuda
#     inference-1 inference-32 inference-256 inference-cuda
#     training training-float32 training-cuda memory scaling
#     curves                                losses of a training, fused and eager
#
# Each part stands alone and ends within ten minutes, with the build if it is the first. PART.log and PART.json grow in
# benchmarks/results/<device>/ while it runs; a part that fails or is cut off stops none of the others, and is named at
# the end. `mobilenet-ext bench readme` then draws the pictures and writes the README's tables.
#
#   OUT                     another folder for the results
#   PYTHON                  [python3]
#   MOBILENET_EXT_COMMIT    the commit, for a copy of the checkout without its history
set -uo pipefail
out=${OUT:+$(realpath -m "$OUT")}
cd "$(dirname "$0")/.." || exit

LIMIT=560 # seconds a part
PARTS=(
  build doctor tests-triton tests-cuda sanitizer speed
  kernels-forward kernels-backward kernels-inference kernels-cuda
  inference-1 inference-32 inference-256 inference-cuda
  training training-float32 training-cuda memory scaling curves
)
python=${PYTHON:-python3}
child=
export PYTHONUNBUFFERED=1 # so that a log holds all that was said before a part was cut off

# Runs a command in what is left of the part's time; its children end with it.
run() {
  local left=$((deadline - SECONDS))
  if ((left <= 0)); then
    echo "gpu_report: no time left for: $*"
    return 124
  fi
  printf '+%s\n' "$(printf ' %q' "$@")"
  timeout --kill-after=10 "$left" "$@" &
  child=$!
  wait "$child"
  local status=$?
  ((status != 124)) || echo "gpu_report: cut off, the part has $LIMIT s"
  return "$status"
}

# In the background, and waited for: only so is a Ctrl-C heard at once.
trap 'trap - INT TERM; [ -z "$child" ] || kill "$child" 2> /dev/null; echo "gpu_report: interrupted" >&2; exit 130' INT TERM

# pytest, where a skipped test has shown nothing: a backend that cannot run here fails its part.
tests() {
  local report status=0
  report=$(mktemp)
  run "$python" -m pytest -vv -rs --durations=5 --junitxml "$report" "$@" || status=$?
  if grep -o '<skipped [^>]*' "$report" | grep -v 'needs two GPUs' | sort | uniq -c; then
    echo "gpu_report: tests were skipped"
    status=1
  fi
  rm "$report"
  return "$status"
}

# All but what needs the GPU for itself, in several processes where pytest-xdist is there: most of the time goes into
# float64 on the CPU and into compiling Triton kernels. Then tensors of many gigabytes, one after the other.
tests_of() { # backend, which tests
  local parallel=() status=0
  local ignored=(--ignore=tests/gpu/test_gpu_{sanitizer,speed,large_tensors}.py)
  if "$python" -c 'import xdist' 2> /dev/null; then parallel=(-n 8); fi
  OMP_NUM_THREADS=2 tests "${parallel[@]}" "${ignored[@]}" tests/gpu -k "$2" || status=$?
  tests tests/gpu/test_gpu_large_tensors.py -k "$1" || status=$?
  return "$status"
}

bench() {
  run "$python" -m mobilenet_ext bench "$@" --device cuda --json "$out/$part.json"
}

run_part() {
  local bf16=(--dtype bfloat16)
  local ours=(mobilenet_ext "mobilenet_ext, CUDA graph") eager=("eager NCHW" "eager channels_last")
  case $part in
    doctor) run "$python" -m mobilenet_ext doctor ;;
    tests-triton) tests_of triton triton ;;
    tests-cuda) tests_of cuda "cuda or agree" ;;
    sanitizer) tests tests/gpu/test_gpu_sanitizer.py ;;
    speed) tests tests/gpu/test_gpu_speed.py ;;
    kernels-cuda) bench kernels "${bf16[@]}" --backend cuda --rounds 5 --peers ;;
    kernels-*) bench kernels "${bf16[@]}" --passes "${part#kernels-}" --rounds 5 ;;
    inference-cuda) bench inference "${bf16[@]}" --backend cuda --no-memory --peers "${ours[@]}" ;;
    inference-*) bench inference "${bf16[@]}" --batch "${part#inference-}" --no-memory ;;
    training) bench training "${bf16[@]}" --no-memory ;;
    training-float32) bench training --dtype float32 --no-memory ;;
    training-cuda) bench training "${bf16[@]}" --backend cuda --no-memory --peers mobilenet_ext "${eager[@]}" ;;
    memory) bench training "${bf16[@]}" --rounds 3 --peers mobilenet_ext "${eager[@]}" ;;
    scaling) bench scaling "${bf16[@]}" --batch 128 --rounds 5 --no-memory ;;
    curves) bench curves ;;
  esac
}

build() {
  run "$python" -m pip install --disable-pip-version-check --no-build-isolation --no-deps -v -e .
}

if (($# == 0)); then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
  exit 2
fi
[ "$*" != all ] || set -- "${PARTS[@]}"
for part; do
  if [[ " ${PARTS[*]} " != *" $part "* ]]; then
    echo "gpu_report: no part $part; there are: ${PARTS[*]} and all" >&2
    exit 2
  fi
done
# Asked for now: results that are written over committed ones would make the checkout a changed one.
export MOBILENET_EXT_COMMIT=${MOBILENET_EXT_COMMIT:-$(git describe --always --dirty --abbrev=12 --exclude='*')}
if [ -z "$MOBILENET_EXT_COMMIT" ]; then
  echo "gpu_report: git does not say which commit this is: set MOBILENET_EXT_COMMIT" >&2
  exit 2
fi
if ! device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())'); then
  echo "gpu_report: torch finds no GPU" >&2
  exit 2
fi
# The folder's name as benchmarks/results.py makes it, which cannot be imported before the build.
folder=$(tr -cs 'a-z0-9' '-' <<< "${device,,}")
out=${out:-benchmarks/results/${folder%-}}
mkdir -p "$out" || exit

deadline=$LIMIT # the start of the script counts too
if ! build > "$out/build.log" 2>&1; then
  tail -n 40 "$out/build.log"
  echo "gpu_report: failed: build, see $out/build.log"
  exit 1
fi
failed=()
for part; do
  [ "$part" != build ] || continue
  echo "== $part, $device"
  start=$SECONDS
  exec 3> >(tee "$out/$part.log")
  tee=$!
  if run_part >&3 2>&1 3>&-; then
    result=passed
  else
    result="FAILED with status $?"
    failed+=("$part")
  fi
  exec 3>&-
  wait "$tee"
  echo "== $part: $result, $((SECONDS - start)) s"
  deadline=$((SECONDS + LIMIT))
done
if ((${#failed[@]})); then
  echo "gpu_report: failed: ${failed[*]}; the logs are in $out"
  exit 1
fi
echo "gpu_report: all passed: $*; the results are in $out"
