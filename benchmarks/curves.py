"""Training runs on the digits, ours and eager PyTorch's, from the same seed in the same order: do the curves agree?"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from benchmarks.network import Workload
from benchmarks.peers import OURS
from mobilenet_ext.train.recipe import default_recipe
from mobilenet_ext.train.run import RunOptions, run_training

EAGER = "eager channels_last"
AMP = {"float32": "off", "bfloat16": "bf16", "float16": "fp16"}


def compare_training(work: Workload, epochs: int) -> dict[str, Any]:
    """A result for one workload; its rows have ``history``, a row an epoch as ``mobilenet-ext train`` records it.

    Raises:
        TrainError: scikit-learn, which has the digits, is not installed, or a run diverged.
    """
    recipe = default_recipe(
        "digits", width=work.width, resolution=work.resolution, epochs=epochs, batch_size=work.batch,
        amp=AMP[work.dtype],
    )  # fmt: skip
    rows = []
    for runner, kernels in ((OURS, contextlib.nullcontext()), (EAGER, plain_modules())):
        print(f"{runner}, {work.dtype}", flush=True)
        with kernels, tempfile.TemporaryDirectory() as folder:
            done = run_training(recipe, folder, RunOptions(torch.device(work.device)))
        if done.interrupted:
            raise KeyboardInterrupt
        rows.append({"runner": runner, "history": done.history})
    return {"workload": work._asdict(), "rows": rows}


@contextlib.contextmanager
def plain_modules() -> Iterator[None]:
    """Every network runs as the PyTorch modules it is made of, since a hook that watches all modules does not let ours
    fuse any."""
    hook = register_module_forward_hook(lambda module, inputs, output: None)
    try:
        yield
    finally:
        hook.remove()


def curves_lines(results: list[dict[str, Any]]) -> list[list[str]]:
    """The ends of the curves, a line a run."""
    lines = [["", "epochs", "train loss", "validation loss", "validation accuracy", "s an epoch"]]
    for result in results:
        for row in result["rows"]:
            last = row["history"][-1]
            lines.append(
                [
                    f"{row['runner']}, {result['workload']['dtype']}",
                    str(last["epoch"]),
                    f"{last['train_loss']:.4f}",
                    f"{last['val_loss']:.4f}",
                    f"{last['val_accuracy']:.4f}",
                    f"{last['seconds']:.2f}",
                ]
            )
    return lines
