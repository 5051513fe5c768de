"""A training run: from a recipe to a folder with checkpoints, metrics and curves; interrupted and resumed at will."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobilenet_ext import cuda_graph
from mobilenet_ext.files import write_atomically
from mobilenet_ext.train.checkpoint import load_checkpoint, load_state, load_weights, save_checkpoint, wrong_entry
from mobilenet_ext.train.errors import TrainError, reason
from mobilenet_ext.train.initial_weights import InitialWeights, load_initial_weights, read_initial_weights
from mobilenet_ext.train.interrupt import Interrupt
from mobilenet_ext.train.loader import default_workers
from mobilenet_ext.train.loop import EpochStats, count_trainable_parameters, evaluate, train_one_epoch
from mobilenet_ext.train.model import AMP_DTYPES, against_single_values, build_model, check_trainable
from mobilenet_ext.train.output import output_folder
from mobilenet_ext.train.process_state import random_state, torch_defaults, use_backend
from mobilenet_ext.train.recipe import MOBILENET_V1, Recipe
from mobilenet_ext.train.records import EVENTS_PREFIX, METRICS, PICTURE, Records
from mobilenet_ext.train.report import Progress, epoch_line, note, progress_missing, say
from mobilenet_ext.train.sources import Source, make_loader, open_sources
from mobilenet_ext.train.step_graph import StepGraph
from mobilenet_ext.train.transforms import Normalise

LAST, BEST, CONFIG = "last.pt", "best.pt", "config.json"


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where and how a run computes; nothing here is meant to change its numbers.

    Attributes:
        device: what it trains on.
        backend: kernels to use, a name of ``mobilenet_ext.backends``; None leaves the choice as it is.
        workers: data loading processes; None for a default by the kind of data.
        data_dir: where Imagenette lies, or is to be put.
        corrupt: what to do with unreadable images: ``"skip"`` or ``"refuse"``.
        cuda_graph: whether training steps are replayed from CUDA graphs, see ``StepGraph``; None where they can be: on
            a GPU, without float16, whose gradient scaler decides on the host.
    """

    device: torch.device = torch.device("cpu")
    backend: str | None = None
    workers: int | None = None
    data_dir: str = "data"
    corrupt: str = "skip"
    cuda_graph: bool | None = None


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run ended with.

    Attributes:
        out: its folder.
        parameters: trainable parameters of its model.
        history: a row per finished epoch, as in ``metrics.jsonl``.
        interrupted: whether Ctrl-C ended it.
    """

    out: Path
    parameters: int
    history: list[dict[str, Any]]
    interrupted: bool

    @property
    def best_accuracy(self) -> float:
        return max((row["val_accuracy"] for row in self.history), default=float("nan"))


def has_run(out: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a run that can be resumed."""
    return os.path.exists(Path(out) / LAST)  # False, too, where nobody may look, or for a name that is too long


def recorded_recipe(out: str | os.PathLike[str]) -> Recipe:
    """The recipe of the run in a folder.

    Raises:
        TrainError: there is no run, or its ``last.pt`` cannot be read.
    """
    if not has_run(out):
        raise TrainError(f"there is no run to resume in {out}: no {LAST}")
    return load_checkpoint(Path(out) / LAST)["config"]


def check_recipe(out: str | os.PathLike[str], given: Mapping[str, Any]) -> None:
    """Raises ``TrainError`` where the run in a folder has other settings of the recipe than those given; names them.

    The images may have moved since: where they lie is not compared here, what they are is when they are opened.
    """
    recorded = recorded_recipe(out).to_dict()
    changed = [
        f"--{name.replace('_', '-')} is {recorded[name]} there, {given[name]} now"
        for name in given
        if name != "data" and given[name] != recorded[name]
    ]
    if changed:
        raise TrainError(f"cannot resume {out} with another recipe: {'; '.join(changed)}")


def run_training(
    recipe: Recipe,
    out: str | os.PathLike[str],
    options: RunOptions,
    *,
    resume: bool = False,
    init: str | os.PathLike[str] | None = None,
) -> RunResult:
    """Runs a recipe, or the rest of it.

    After every epoch a line is printed, and ``out`` holds ``config.json``, ``metrics.jsonl``, TensorBoard events,
    ``last.pt`` and, of the epoch with the best validation accuracy so far, ``best.pt``; ``curves.png`` follows within
    half a minute and at the end. Ctrl-C ends the run after the current batch; ``last.pt`` is then the end of the
    previous epoch. On the CPU, a resumed run gives bit for bit the numbers of one that was never stopped. While it
    runs, ``out`` is locked; afterwards the process has its random numbers, its backend and its SIGINT handler back.

    Args:
        recipe: what to train. On resuming it must be the one that the run was started with.
        out: folder, created where needed.
        options: where and how.
        resume: go on with the run in ``out``. Without it, ``out`` must not hold a run.
        init: file of weights to start from, see ``initial_weights.read_initial_weights``; a head for another number of
            classes starts with random weights. Its name and digest are recorded in ``config.json`` and in the
            checkpoints; resuming does not need the file. None: all weights are random.

    Returns:
        The history of the whole run, that before resuming included.

    Raises:
        TrainError: anything that the user can put right; the message says what.
    """
    if resume and init is not None:
        raise TrainError(f"--init cannot be given with --resume: the run in {out} has its weights already")
    weights = None if init is None else read_initial_weights(init)  # first, for the images may take minutes to read
    out = Path(out)
    written = (LAST, BEST, CONFIG, METRICS, PICTURE, f"{EVENTS_PREFIX}*")
    with (
        output_folder(out, *written),
        use_backend(options.backend),
        torch_defaults(),
        random_state(recipe.seed, options.device),
    ):
        if has_run(out) and not resume:
            raise TrainError(f"{out} already holds a run: --resume goes on with it, another --out starts a new one")
        if resume:
            check_recipe(out, recipe.to_dict())
        run = _Run(recipe, out, options, weights, load_checkpoint(out / LAST, resumable=True) if resume else None)
        try:
            with Interrupt() as interrupt:
                run.go(interrupt)
        except torch.OutOfMemoryError as error:
            instead = "a smaller --batch-size" + (" or --no-cuda-graph" if run.step_graph is not None else "")
            raise TrainError(f"out of memory on {options.device}: try {instead}") from error
        except ValueError as error:  # images that cannot be read may leave one in a batch, which nobody has tried
            if (advice := against_single_values(error)) is None:
                raise
            raise TrainError(f"{recipe.network} does not train on a batch: {reason(error)}; {advice}") from error
        finally:
            run.records.close()
        return RunResult(out, run.parameters, run.history, interrupt.requested)


def _captures(recipe: Recipe, options: RunOptions) -> bool:
    """Whether a run replays its steps from CUDA graphs.

    Raises:
        TrainError: it is to, and cannot.
    """
    on_gpu = cuda_graph.is_for(options.device)
    if not options.cuda_graph:
        return options.cuda_graph is None and on_gpu and recipe.amp != "fp16"
    if not on_gpu:
        raise TrainError(f"--cuda-graph: expected a CUDA device, got {options.device}")
    if recipe.amp == "fp16":
        raise TrainError(
            "--cuda-graph: expected --amp off or bf16, got fp16, whose gradient scaler decides on the host"
        )
    return True


class _Run:
    """The state of a run between two epochs."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        options: RunOptions,
        weights: InitialWeights | None,
        content: dict[str, Any] | None,
    ) -> None:
        self.recipe, self.out, self.device = recipe, out, options.device
        self.step_graph = StepGraph(note) if _captures(recipe, options) else None
        train_source, val_source = open_sources(recipe, data_dir=options.data_dir, corrupt=options.corrupt)
        self.classes = train_source.classes
        self.dataset = {"name": train_source.name, "train_images": len(train_source), "val_images": len(val_source)}
        self.found_unreadable = len(train_source.unreadable) + len(val_source.unreadable)
        workers = default_workers(recipe.data) if options.workers is None else options.workers
        self.train_loader, self.val_loader = (
            make_loader(recipe, source, split, workers=workers, pin_memory=self.device.type == "cuda")
            for source, split in ((train_source, "train"), (val_source, "val"))
        )

        self.model = build_model(recipe, len(self.classes), self.device)
        if recipe.model != MOBILENET_V1:
            check_trainable(self.model, recipe, len(self.classes), len(train_source), self.device)
        self.init = None if weights is None else weights.origin
        fresh = [] if weights is None else load_initial_weights(self.model, weights, len(self.classes), recipe.network)
        self.parameters = count_trainable_parameters(self.model)
        self.loss_function = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, T_max=recipe.epochs, eta_min=recipe.lr * recipe.lr_floor
        )
        self.scaler = torch.amp.GradScaler(self.device.type) if recipe.amp == "fp16" else None
        self.prepare = Normalise(recipe.mean, recipe.std, self.device)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        if content is not None:
            self._restore(content)
        title = f"{recipe.network} on {train_source.name}, {recipe.resolution}x{recipe.resolution}"
        self.records = Records(out, self.history, title)
        self._announce(title, train_source, val_source)
        if weights is not None:
            head = f"; its head is for another number of classes, and is not taken: {'; '.join(fresh)}" if fresh else ""
            say(f"starts from the weights in {weights.path}{head}")
        self._write_config(options, workers)
        if content is None:
            self._save(LAST)  # so that even the first epoch can be resumed, and a full disk shows before it, not after

    def _announce(self, title: str, train_source: Source, val_source: Source) -> None:
        images = f"{len(train_source)} training and {len(val_source)} validation images"
        say(f"{title}: {self.parameters:,} parameters, {images}, {self.device}, output in {self.out}")
        for package in self.records.missing:
            lost = {"tensorboard": "no TensorBoard events", "matplotlib": "no picture of the curves"}[package]
            note(f"{package} is not installed, so there will be {lost}: pip install {package}")
        if (missing := progress_missing()) is not None:
            note(f"no progress bar: {missing}")

    def _write_config(self, options: RunOptions, workers: int) -> None:
        config = {
            "recipe": self.recipe.to_dict(),
            "options": {**dataclasses.asdict(options), "device": str(options.device), "workers": workers},
            "init": self.init,
            "dataset": self.dataset,
            "classes": self.classes,
            "parameters": self.parameters,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        try:
            write_atomically(self.out / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
        except OSError as error:
            raise TrainError(f"cannot write {self.out / CONFIG}: {reason(error)}") from error

    def _restore(self, content: dict[str, Any]) -> None:
        path = self.out / LAST
        if content["classes"] != self.classes or content["dataset"] != self.dataset:
            raise TrainError(
                f"cannot resume {self.out}: the data is no longer the same: {content['dataset']} with "
                f"{len(content['classes'])} classes then, {self.dataset} with {len(self.classes)} now"
            )
        load_weights(self.model, content, path)
        load_state(self.optimizer, content, "optimizer", path)
        load_state(self.scheduler, content, "scheduler", path)
        if self.scaler is not None:
            load_state(self.scaler, content, "scaler", path)
        try:
            torch.set_rng_state(content["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in content["rng"]:
                torch.cuda.set_rng_state(content["rng"]["cuda"], self.device)
        except (RuntimeError, TypeError) as error:
            raise wrong_entry(path, "rng", "random states of this PyTorch", content["rng"]["cpu"]) from error
        self.epoch, self.history, self.init = content["epoch"], content["history"], content["init"]

    def _save(self, *names: str) -> None:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "rng": rng,
            "epoch": self.epoch,
            "history": self.history,
            "config": self.recipe.to_dict(),
            "init": self.init,
            "classes": self.classes,
            "dataset": self.dataset,
        }
        for name in names:
            save_checkpoint(self.out / name, content)

    def go(self, interrupt: Interrupt) -> None:
        """Trains the epochs that are left."""
        if self.epoch == self.recipe.epochs:
            say(f"nothing left to do: all {self.epoch} epochs of {self.out} are done")
        while self.epoch < self.recipe.epochs and not interrupt.requested:
            self._one_epoch(interrupt)
        self.records.draw(self.history, at_once=True)
        skipped = self.found_unreadable + len(self.train_loader.skipped) + len(self.val_loader.skipped)
        if skipped:
            note(f"unreadable images skipped: {skipped}")
        if self.epoch < self.recipe.epochs:
            say(f"interrupted: {self.out / LAST} is the end of epoch {self.epoch}; --resume --out {self.out} goes on")
        elif self.history:
            best = max(self.history, key=lambda row: row["val_accuracy"])
            say(f"best validation accuracy {best['val_accuracy']:.4f} (epoch {best['epoch']}): {self.out / BEST}")

    def _one_epoch(self, interrupt: Interrupt) -> None:
        epoch, epochs = self.epoch + 1, self.recipe.epochs
        lr = self.optimizer.param_groups[0]["lr"]
        passes = {
            "loss_function": self.loss_function,
            "device": self.device,
            "prepare": self.prepare,
            "amp_dtype": AMP_DTYPES[self.recipe.amp],
            "should_stop": interrupt,
        }
        self.train_loader.set_epoch(epoch)
        with Progress(f"{epoch}/{epochs} train", len(self.train_loader)) as bar:
            train = train_one_epoch(
                self.model,
                self.train_loader,
                self.optimizer,
                scaler=self.scaler,
                step_graph=self.step_graph,
                on_batch=bar,
                **passes,
            )
        val = None
        if train.complete:
            _require_finite(train, epoch)
            with Progress(f"{epoch}/{epochs} val", len(self.val_loader)) as bar:
                val = evaluate(self.model, self.val_loader, on_batch=bar, **passes)
        if val is None or not val.complete:
            self._report_broken_epoch(epoch, train, val)
            return
        say(epoch_line(epoch, epochs, train, val))
        self.scheduler.step()
        self._finish_epoch(epoch, lr, train, val)

    def _report_broken_epoch(self, epoch: int, train: EpochStats, val: EpochStats | None) -> None:
        if train.images:
            val = val if val is not None and val.images else None
            done = f"{train.batches} of {len(self.train_loader)} training batches"
            if val is not None:
                done += f", {val.batches} of {len(self.val_loader)} validation batches"
            say(f"{epoch_line(epoch, self.recipe.epochs, train, val)}  | interrupted after {done}")
        else:
            say(f"Epoch: {epoch}/{self.recipe.epochs} interrupted before its first batch")

    def _finish_epoch(self, epoch: int, lr: float, train: EpochStats, val: EpochStats) -> None:
        best_so_far = max((row["val_accuracy"] for row in self.history), default=-1.0)
        self.epoch = epoch
        row = {
            "epoch": epoch,
            "lr": lr,
            "train_loss": train.loss,
            "train_accuracy": train.accuracy,
            "val_loss": val.loss,
            "val_accuracy": val.accuracy,
            "val_top5_accuracy": val.top5_accuracy,
            "seconds": train.seconds,
            "images_per_second": train.images_per_second,
            "unreadable": self.found_unreadable + len(self.train_loader.skipped) + len(self.val_loader.skipped),
            "time": time.time(),
        }
        self.history.append(row)
        # In this order, a run that is killed anywhere in between loses nothing: last.pt says which epochs there were,
        # and resuming from it writes the rest again.
        self.records.add(row)
        self.records.draw(self.history, at_once=False)
        self._save(*((BEST, LAST) if val.accuracy > best_so_far else (LAST,)))


def _require_finite(train: EpochStats, epoch: int) -> None:
    if not math.isfinite(train.loss):
        raise TrainError(f"the training loss of epoch {epoch} is {train.loss}: the run diverged; try a smaller --lr")
