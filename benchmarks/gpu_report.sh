#!/usr/bin/env bash
# All that is to be shown on a GPU: the tests on both GPU backends, compute-sanitizer, the benchmarks beside every peer
# that is installed, and two training runs. Needs a GPU, torch built for CUDA, nvcc and pytest; downloads nothing.
#
#   benchmarks/gpu_report.sh quick          the first ten minutes on a GPU, build included; its parts are below
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
# `quick` has parts of its own, each with a time limit of its own; what they print is in quick.log, and their results
# grow in a PART.json each. Asked for alone, such a part has PART.log as any other.
#
#   smoke                                 doctor, and every op once on each backend, on Triton in bfloat16
#   correct                               both backends agree, and every layer against float64
#   compile                               the Triton kernels of the networks below, in parallel
#   layers                                each layer and pass on both backends
#   step calls widths                     training steps, inference, steps at four widths: with host time and in CUDA
#                                         graphs, beside eager PyTorch
#   step-cuda calls-cuda                  steps and inference of the CUDA backend
#
#   OUT                     another folder for the results
#   PREBUILT                a folder with _cpu.abi3.so, _cuda.abi3.so and build_info_generated.h of a build elsewhere: only
#                           what depends on the Python is compiled here, and nothing is installed
#   PYTHON                  [python3]
#   MOBILENET_EXT_COMMIT    the commit, for a copy of the checkout without its history
set -uo pipefail
out=${OUT:+$(realpath -m "$OUT")}
prebuilt=${PREBUILT:+$(realpath -m "$PREBUILT")}
cd "$(dirname "$0")/.." || exit

LIMIT=560 # seconds a part
QUICK_LIMIT=525 # seconds for all of quick
# Seconds that a part of quick may take, so that one which hangs leaves time for others.
declare -A QUICK=(
  [smoke]=100 [correct]=130 [compile]=100 [layers]=110 [step]=75 [widths]=90 [calls]=60
  [step-cuda]=50 [calls-cuda]=50
)
QUICK_PARTS=(smoke correct compile layers step calls widths step-cuda calls-cuda)
PARTS=(
  build doctor tests-triton tests-cuda sanitizer speed
  kernels-forward kernels-backward kernels-inference kernels-cuda
  inference-1 inference-32 inference-256 inference-cuda
  training training-float32 training-cuda memory scaling curves
)
python=${PYTHON:-python3}
child=
export PYTHONUNBUFFERED=1 # so that a log holds all that was said before a part was cut off
[ -z "$prebuilt" ] || export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

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
  ((status != 124)) || echo "gpu_report: cut off, $left s were left"
  return "$status"
}

# In the background, and waited for: only so is a Ctrl-C heard at once.
trap 'trap - INT TERM; [ -z "$child" ] || kill "$child" 2> /dev/null; echo "gpu_report: interrupted" >&2; exit 130' INT TERM

# pytest, where a skipped test has shown nothing: a backend that cannot run here fails its part.
tests() {
  local report status=0
  report=$(mktemp)
  run "$python" -m pytest -n0 -vv -rs --durations=5 --junitxml "$report" "$@" || status=$?
  if grep -o '<skipped [^>]*' "$report" | grep -v 'needs two GPUs\|needs a Hopper GPU' | sort | uniq -c; then
    echo "gpu_report: tests were skipped"
    status=1
  fi
  rm "$report"
  return "$status"
}

# All but what needs the GPU for itself, in several processes: most of the time goes into
# float64 on the CPU and into compiling Triton kernels. Then tensors of many gigabytes, one after the other.
tests_of() { # backend, which tests
  local status=0
  local ignored=(--ignore=tests/gpu/test_gpu_{sanitizer,speed,large_tensors}.py)
  OMP_NUM_THREADS=2 tests -n 8 "${ignored[@]}" tests/gpu -k "$2" || status=$?
  tests tests/gpu/test_gpu_large_tensors.py -k "$1" || status=$?
  return "$status"
}

bench() {
  run "$python" -m mobilenet_ext bench "$@" --device cuda --json "$out/$part.json"
}

# Runs all of them, whatever fails.
smoke() {
  local status=0
  timeout 10 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit --format=csv || true
  run "$python" -m mobilenet_ext doctor || status=$?
  run "$python" tests/every_op.py cuda || status=$?
  run "$python" tests/every_op.py triton 12 bfloat16 || status=$?
  return "$status"
}

# The layers in bfloat16 in training, and in float32.
correct() {
  OMP_NUM_THREADS=1 tests -n 12 --maxprocesses 12 --maxfail 20 tests/gpu/test_gpu_{agreement,units}.py \
    -k 'agree or (16_bits and bf16 and training) or (float32 and not eval)'
}

run_part() {
  local bf16=(--dtype bfloat16)
  local ours=(mobilenet_ext "mobilenet_ext, CUDA graph") eager=("eager NCHW" "eager channels_last")
  local graphs=("eager channels_last" "eager channels_last, CUDA graph")
  local brief=("${bf16[@]}" --rounds 3 --burst 0.1)
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
    smoke) smoke ;;
    correct) correct ;;
    compile) run "$python" -m benchmarks.warm_up training:1:256 inference:1:{256,32,1} training:{1,0.75,0.5,0.25}:128 ;;
    layers) bench kernels "${brief[@]}" --burst 0.02 --batch 256 --backend triton cuda --peers ;;
    step) bench training "${brief[@]}" --no-memory --batch 256 --peers "${ours[@]}" "${graphs[@]}" ;;
    widths) bench training "${brief[@]}" --no-memory --batch 128 --width 1 0.75 0.5 0.25 --peers "${ours[@]}" "${graphs[0]}" ;;
    step-cuda) bench training "${brief[@]}" --no-memory --batch 256 --backend cuda --peers "${ours[@]}" ;;
    calls) bench inference "${brief[@]}" --no-memory --peers "${ours[@]}" "${graphs[@]}" ;;
    calls-cuda) bench inference "${brief[@]}" --no-memory --backend cuda --peers "${ours[@]}" ;;
  esac
}

build() {
  if [ -n "$prebuilt" ]; then
    from_prebuilt
    return
  fi
  run "$python" -m pip install --disable-pip-version-check --no-build-isolation --no-deps -v -e .
}

# The two libraries have no Python in them; pybind11 is the one that torch brings along.
from_prebuilt() {
  local places
  if grep 'ARCHITECTURES ""' "$prebuilt/build_info_generated.h"; then
    echo "gpu_report: the build in $prebuilt has no CUDA kernels"
    return 1
  fi
  mapfile -t places < <("$python" -c 'if True:
    import os, sysconfig, torch
    print(sysconfig.get_path("include"), os.path.dirname(torch.__file__), sysconfig.get_config_var("EXT_SUFFIX"), sep="\n")')
  local host="mobilenet_ext/_host${places[2]}"
  run cp "$prebuilt"/_cpu.abi3.so "$prebuilt"/_cuda.abi3.so mobilenet_ext/ || return
  [ "$host" -nt "$prebuilt/build_info_generated.h" ] ||
    run "${CXX:-g++}" -std=c++17 -O2 -shared -fPIC -fvisibility=hidden -Icsrc -I"$prebuilt" -isystem "${places[0]}" \
      -isystem "${places[1]}/include" csrc/host/*.cpp -o "$host"
}

if (($# == 0)); then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
  exit 2
fi
quick=
case "$*" in
  all) set -- "${PARTS[@]}" ;;
  quick)
    quick=quick
    set -- "${QUICK_PARTS[@]}"
    ;;
esac
for part; do
  if [[ " ${PARTS[*]} ${QUICK_PARTS[*]} " != *" $part "* ]]; then
    echo "gpu_report: no part $part; there are: ${PARTS[*]} and all, ${QUICK_PARTS[*]} and quick" >&2
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

# When the next part must have ended; the start of the script counts too.
set_deadline() {
  deadline=$(($1 + LIMIT))
  [ -n "$quick" ] || return
  deadline=$(($1 + ${QUICK[$part]:-$QUICK_LIMIT}))
  ((deadline < QUICK_LIMIT)) || deadline=$QUICK_LIMIT
}

part=build
set_deadline 0
if ! build > "$out/build.log" 2>&1; then
  tail -n 40 "$out/build.log"
  echo "gpu_report: failed: build, see $out/build.log"
  exit 1
fi
failed=()
[ -z "$quick" ] || : > "$out/quick.log"
for part; do
  [ "$part" != build ] || continue
  log="$out/${quick:-$part}.log"
  [ -n "$quick" ] || : > "$log"
  start=$SECONDS
  [ -z "$quick" ] || set_deadline "$start" # in the other case the first part shares its time with the build
  exec 3> >(tee -a "$log")
  tee=$!
  echo "== $part, $device, at $start s" >&3
  if run_part >&3 2>&1 3>&-; then
    result=passed
  else
    result="FAILED with status $?"
    failed+=("$part")
  fi
  echo "== $part: $result, $((SECONDS - start)) s" >&3
  exec 3>&-
  wait "$tee"
  set_deadline "$SECONDS"
done
if ((${#failed[@]})); then
  echo "gpu_report: failed: ${failed[*]}; the logs are in $out"
  exit 1
fi
echo "gpu_report: all passed: $*; the results are in $out"
