#!/usr/bin/env bash
# Installs mobilenet_ext in fresh virtual environments: {pip 23.2.1, newest pip} x {no torch, CPU build, newest torch} x
# {from an unpacked sdist, editable}, and checks each installation. Slow (many gigabytes of torch), so not part of the
# test suite. Results, one line each, go to standard output; the logs stay in the folder that is printed first.
#
#   tests/install_matrix.sh [PYTHON]          TORCH_CPU: requirement of the CPU build, default torch==2.13.0+cpu
set -euo pipefail

python=${1:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
echo "logs: $work"

# The sdist is unpacked anew for each trial, and the editable one gets a copy too: nothing is compiled beforehand.
"$python" -m venv "$work/build"
"$work/build/bin/pip" -q install build
"$work/build/bin/python" -m build -q --sdist --outdir "$work" "$root" > "$work/sdist.log" 2>&1

check() { # folder -> one line; fails unless the installed package runs its C++ kernels
  (cd "$work" && "$1/bin/python" -) << 'PYTHON'
import torch
import mobilenet_ext as mx
from mobilenet_ext import _host

assert mx.backends.available()["cpu"] is None
x, w = torch.randn(2, 8, 5, 5), torch.randn(8, 1, 3, 3)
y = mx.functional.depthwise_conv2d(x, w)
torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w, padding=1, groups=8))
print(f"runs: torch {torch.__version__}, built against {_host.build_info()['torch']}")
PYTHON
}

failed=0
for pip in pip==23.2.1 pip; do
  for torch in "" "${TORCH_CPU:-torch==2.13.0+cpu}" torch; do
    for how in sdist editable; do
      name="$pip, ${torch:-no torch}, $how"
      trial=$(mktemp -d -p "$work")
      log=$trial/log
      mkdir "$trial/source"
      tar -xzf "$work"/mobilenet_ext-*.tar.gz -C "$trial/source" --strip-components=1
      "$python" -m venv "$trial/venv"
      "$trial/venv/bin/pip" -q install -U "$pip" > "$log" 2>&1
      before=none
      if [ -n "$torch" ]; then
        "$trial/venv/bin/pip" -q install "$torch" >> "$log" 2>&1
        before=$("$trial/venv/bin/python" -c 'import torch; print(torch.__version__)')
      fi
      flags=()
      [ "$how" = editable ] && flags=(-e)
      start=$SECONDS
      if "$trial/venv/bin/pip" install -v "${flags[@]}" "$trial/source" > "$trial/install.log" 2>&1 &&
        result=$(check "$trial/venv" 2>> "$log"); then
        # With a torch to build against, none may have been downloaded, for the build or for the environment.
        if [ -n "$torch" ] && grep -qE '(Collecting torch|Using cached torch|Downloading torch)[->=]' "$trial/install.log"; then
          result="FAILED: torch $before was there, and another was fetched" failed=1
        elif [ -n "$torch" ] && [[ "$result" != *"torch $before, built against $before" ]]; then
          result="FAILED: torch $before was there, but: $result" failed=1
        fi
      else
        result="FAILED, see $trial" failed=1
      fi
      echo "$name: $result ($((SECONDS - start)) s)"
      [ "$failed" = 1 ] || rm -rf "$trial/venv" "$trial/source" # gigabytes
    done
  done
done
exit "$failed"
