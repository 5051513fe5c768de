"""mobilenet-ext doctor: the report, and that its self-check fails when the numbers are wrong."""

import argparse
from collections.abc import Callable

import pytest
import torch

import mobilenet_ext as mx
from mobilenet_ext.cli import doctor


def run() -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers(dest="command", required=True))
    return doctor.run(parser.parse_args(["doctor"]))


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    assert f"torch            {torch.__version__}" in out
    assert f"mobilenet_ext    {mx.__version__}" in out
    assert "FAILED" not in out
    for name, why_not in mx.backends.available().items():
        where = None if why_not else mx.backends.device_type(name) or "cpu"
        assert f"  {name:<10} {f'not usable: {why_not}' if why_not else f'usable; float32 on {where} '}" in out
    usable = sum(why_not is None for why_not in mx.backends.available().values())
    assert out.count(" ok\n") == usable * len(doctor.CHECKS) > 0


def test_report_names_the_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("instruction set")]
    assert line.split()[-1] in {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"}


def scaled_output(y: torch.Tensor) -> torch.Tensor:
    return y * (1 + 1e-4)


def nan_output(y: torch.Tensor) -> torch.Tensor:
    return y * float("nan")


def wrong_gradient(y: torch.Tensor) -> torch.Tensor:
    return y.detach() + (y - y.detach()) * (1 + 1e-3)


def raises(y: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize("change", [scaled_output, nan_output, wrong_gradient, raises])
@pytest.mark.parametrize("function", ["depthwise_bn_relu", "pointwise_bn_relu"])
def test_self_check_fails_on_wrong_numbers(
    function: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = getattr(mx.functional, function)

    def wrong_on_cpu(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        y = right(x, *args, **kwargs)
        return change(y) if mx.backends.current(x.device.type) == "cpu" else y

    monkeypatch.setattr(mx.functional, function, wrong_on_cpu)
    assert run() == 1
    out = capsys.readouterr().out
    assert "Wrong numbers from: cpu\n" in out
    cpu_section, others = out[out.index("  cpu  ") :].split("  triton  ")
    assert "FAILED" in cpu_section
    assert "FAILED" not in others
    if change is raises:
        assert "RuntimeError: no such kernel" in cpu_section


def test_self_check_covers_running_statistics(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = mx.functional.pointwise_bn_relu

    def forgets_them(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: None,
        mean: torch.Tensor,
        var: torch.Tensor,
        *rest: object,
        **kwargs: object,
    ) -> torch.Tensor:
        return right(x, weight, bias, mean.clone(), var.clone(), *rest, **kwargs)

    monkeypatch.setattr(mx.functional, "pointwise_bn_relu", forgets_them)
    assert run() == 1
