"""The Triton backend: kernels for NVIDIA GPUs of compute capability 8.0 and newer, compiled at their first use.

With ``TRITON_INTERPRET=1`` in the environment, Triton's interpreter runs the same kernels on CPU tensors, slowly: for
tests and for work on the kernels.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

from mobilenet_ext.backends import gpus

CAPABILITY = (8, 0)


class _Kernels:
    """The ops of ``mobilenet_ext.triton``, imported when the first of them is called."""

    def __getattr__(self, op: str) -> Callable[..., Any]:
        from mobilenet_ext.triton import ops

        self.__dict__.update(ops)
        try:
            return ops[op]
        except KeyError:
            raise AttributeError(op) from None


kernels = _Kernels()
interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
device_type = "cpu" if interpreted else "cuda"


def why_not() -> str | None:
    """Why the kernels cannot run here, or None."""
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return "Triton is not installed"
    except Exception as error:  # whatever a broken installation raises is a reason
        return f"Triton does not import: {type(error).__name__}: {error}".splitlines()[0]
    if interpreted:
        return None
    if reason := gpus.why_not(CAPABILITY):
        return reason
    compiler = os.environ.get("CC", "").split()
    if not any(map(shutil.which, compiler[:1] or ("gcc", "clang"))):
        return "no C compiler is found, and Triton compiles its launchers with one"
    return None
