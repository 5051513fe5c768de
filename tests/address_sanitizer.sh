#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer, from a copy of the sources in build/address-sanitizer, and runs Python
# there with the arguments given:
#
#   tests/address_sanitizer.sh -m pytest -q tests/cpu_kernels          PYTHON: the interpreter, default python3
#
# It does not see what masked loads and stores (AVX-512), streaming stores and AMX access: run with
# MOBILENET_EXT_CPU_ISA=avx2 too. Tensors of a MiB and more come from the system, not from malloc: what is accessed past
# their end goes unnoticed.
set -euo pipefail

python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$root/build/address-sanitizer
mkdir -p "$copy"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --create) |
  tar --extract --directory "$copy"

cd "$copy"
# Without CUDA, as with a torch that has none. Checks are calls: in line, they take the compiler several times as long.
CFLAGS="-g -g1 -fsanitize=address --param asan-instrumentation-with-call-threshold=0" LDFLAGS=-fsanitize=address "$python" -c '
import runpy, sys, torch
torch.version.cuda = None
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")' > build.log 2>&1 || { tail -30 build.log && exit 1; }

# Python is not built with it, so it is loaded first; it looks for the C++ library's throw at once. Python's own objects
# are not freed at its end, and would all be leaks.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:${ASAN_OPTIONS:-}"
export PYTHONPATH=$copy${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$@"
