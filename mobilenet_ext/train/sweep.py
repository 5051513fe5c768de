"""The same recipe at several widths, or for several models: a table, and the four curves of all in one picture."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from mobilenet_ext.files import write_atomically
from mobilenet_ext.train.errors import TrainError, reason
from mobilenet_ext.train.output import output_folder
from mobilenet_ext.train.plots import plot_sweep
from mobilenet_ext.train.recipe import MOBILENET_V1, Recipe
from mobilenet_ext.train.report import note, say
from mobilenet_ext.train.run import RunOptions, RunResult, check_recipe, has_run, run_training

TABLE, ROWS, PICTURE = "sweep.md", "sweep.json", "sweep.png"


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """A run's line of the table.

    Attributes:
        model: as ``Recipe.model``.
        width: width multiplier.
        parameters: trainable parameters.
        accuracy: the best validation accuracy of any epoch.
        seconds_per_epoch: median time of the training pass.
        epochs: finished ones.
    """

    model: str
    width: float
    parameters: int
    accuracy: float
    seconds_per_epoch: float
    epochs: int

    @classmethod
    def of(cls, recipe: Recipe, result: RunResult) -> SweepRow:
        seconds = statistics.median(row["seconds"] for row in result.history)
        return cls(recipe.model, recipe.width, result.parameters, result.best_accuracy, seconds, len(result.history))


def run_folder(out: str | os.PathLike[str], recipe: Recipe) -> Path:
    """Where the run of a recipe lies."""
    own = recipe.model == MOBILENET_V1
    return Path(out) / (f"width-{recipe.width:g}" if own else recipe.model.replace(":", "-"))


def run_sweep(
    recipes: Sequence[Recipe], out: str | os.PathLike[str], options: RunOptions, *, resume: bool = False
) -> tuple[list[SweepRow], bool]:
    """Trains each recipe, in the order given; after each, the table and the picture show those that there are.

    Args:
        recipes: they differ in width alone, or in model.
        out: folder; each run gets one inside.
        options: where and how.
        resume: go on with a sweep: runs that are done are kept, a broken one is resumed, the rest is trained.

    Returns:
        The rows of the table, and whether Ctrl-C ended the sweep.

    Raises:
        TrainError: as ``run.run_training``.
    """
    with output_folder(out, TABLE, ROWS, PICTURE):
        folders = [run_folder(out, recipe) for recipe in recipes]
        for recipe, folder in zip(recipes, folders, strict=True):
            if has_run(folder):
                if not resume:
                    raise TrainError(
                        f"{out} already holds a sweep: --resume goes on with it, another --out starts a new one"
                    )
                check_recipe(folder, recipe.to_dict())
        results: dict[Recipe, RunResult] = {}
        for recipe, folder in zip(recipes, folders, strict=True):
            result = run_training(recipe, folder, options, resume=has_run(folder))
            if result.history:
                results[recipe] = result
            rows = [SweepRow.of(each, done) for each, done in results.items()]
            _write(Path(out), rows, results)
            if result.interrupted:
                return rows, True
        say(f"\n{format_table(rows)}")
        return rows, False


def format_table(rows: Sequence[SweepRow]) -> str:
    """The table, in Markdown."""
    several = _several_models(rows)
    lines = [f"| {'model' if several else 'width'} | parameters | accuracy | seconds an epoch |", "|--:|--:|--:|--:|"]
    for row in rows:
        name = row.model if several else f"{row.width:g}"
        lines.append(f"| {name} | {row.parameters:,} | {row.accuracy:.4f} | {row.seconds_per_epoch:.2f} |")
    return "\n".join(lines)


def _several_models(rows: Sequence[SweepRow]) -> bool:
    return any(row.model != MOBILENET_V1 for row in rows)


def _write(out: Path, rows: Sequence[SweepRow], results: dict[Recipe, RunResult]) -> None:
    try:
        write_atomically(out / TABLE, format_table(rows).encode() + b"\n")
        write_atomically(out / ROWS, json.dumps([dataclasses.asdict(row) for row in rows], indent=2).encode() + b"\n")
        if not results:
            return
        try:
            histories = {recipe.network: result.history for recipe, result in results.items()}
            title = "The same recipe for several networks" if _several_models(rows) else "MobileNetV1 at several widths"
            plot_sweep(histories, out / PICTURE, title)
        except TrainError as error:
            note(f"no picture of the sweep: {error}")
    except OSError as error:
        raise TrainError(f"cannot write to {out}: {reason(error)}") from error
