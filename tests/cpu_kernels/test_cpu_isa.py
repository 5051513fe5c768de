"""Which instruction set the C++ kernels for CPUs run on."""

from __future__ import annotations

from cpu_ops import (
    ISA,
    ISAS,
    run_with_isa,
    supports,
)


def test_the_instruction_set_can_be_read() -> None:
    assert ISA in ISAS and supports(ISA)


def test_an_impossible_instruction_set_is_refused() -> None:
    code = (
        "import torch; from mobilenet_ext.backends import reference; from pathlib import Path;"
        "torch.ops.load_library(str(Path(reference.__file__).parent.parent / '_cpu.abi3.so'));"
        "torch.ops.mobilenet_ext_cpu.norm_act_forward("
        "torch.zeros(1, 1, 1, 1).to(memory_format=torch.channels_last), torch.zeros(5, 1), 1, False)"
    )
    result = run_with_isa("avx1024", "-c", code)
    assert result.returncode != 0
    assert "MOBILENET_EXT_CPU_ISA=avx1024" in result.stderr and "baseline" in result.stderr
