"""The instruction sets of the CPU kernels: this machine's own is tested everywhere else, the others here, in processes
that are forced to use them.

What differs between them is the number of lanes, the tiles, and how bfloat16 is multiplied. By default they run what is
marked ``cover`` and is not slow: every op and dtype on a shape that fills vectors and tiles and on shapes that end
within one, NaN and Inf, overflow, thread counts. Under ``every_isa`` they run all tests of the kernels.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cpu_ops import (
    ISA,
    ISAS,
    run_with_isa,
    supports,
)

KERNELS = ("depthwise", "pointwise", "dense", "norm_act", "block_inference")
FILES = [str(Path(__file__).with_name(f"test_cpu_{name}.py")) for name in KERNELS]
FILES.append(str(Path(__file__).parent.with_name("test_overflow.py")))
each_other_isa = pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != ISA])


def run_tests(isa: str, marked: str, *files: str) -> None:
    if not supports(isa):
        pytest.skip(f"this machine has no {isa}")
    result = run_with_isa(isa, "-m", "pytest", "-n0", "-x", "-m", marked, "-p", "no:cacheprovider", *files)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=[pytest.mark.slow] * isa.startswith("avx512")) for isa in ISAS if isa != ISA]
)
def test_cover_on_other_instruction_sets(isa: str) -> None:
    run_tests(isa, "cover and not slow", __file__, *FILES)


@pytest.mark.every_isa
@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).stem)
@each_other_isa
def test_everything_on_other_instruction_sets(isa: str, file: str) -> None:
    run_tests(isa, "not soak", file)


@pytest.mark.cover
def test_the_instruction_set_can_be_read_and_forced() -> None:
    assert ISA in ISAS and supports(ISA)
    assert os.environ.get("MOBILENET_EXT_CPU_ISA", ISA) == ISA


def test_an_impossible_instruction_set_is_refused() -> None:
    code = (
        "import torch; import mobilenet_ext; from pathlib import Path;"
        "torch.ops.load_library(str(Path(mobilenet_ext.__file__).parent / '_cpu.abi3.so'));"
        "torch.ops.mobilenet_ext_cpu.norm_act_forward("
        "torch.zeros(1, 1, 1, 1).to(memory_format=torch.channels_last), torch.zeros(5, 1), 1, False)"
    )
    result = run_with_isa("avx1024", "-c", code)
    assert result.returncode != 0
    assert "MOBILENET_EXT_CPU_ISA=avx1024" in result.stderr and "baseline" in result.stderr
