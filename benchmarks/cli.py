"""``mobilenet-ext bench``: one module a subcommand's work, this one the options."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

import mobilenet_ext as mx
from benchmarks import activations, comparison, curves, kernels, limits, pictures, readme, results, scaling, table
from benchmarks import compare as compare_module
from benchmarks.network import DTYPES, Workload
from benchmarks.peers import NAMES, OURS, is_ours
from mobilenet_ext.models import libraries
from mobilenet_ext.train.recipe import MOBILENET_V1

INFERENCE_BATCHES = {"cpu": [1, 32], "cuda": [1, 32, 256]}
TRAINING_BATCH = {"cpu": [32], "cuda": [256]}
CURVES_BATCH = 32  # the recipe's for the digits


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status; 1 where our own output was wrong or a file is none of ours."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    args.words = words
    try:
        return args.run(args)
    except ValueError as error:
        print(f"mobilenet-ext bench: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mobilenet-ext bench",
        description="Times mobilenet_ext beside everything else that is installed and runs the network. Every output "
        "is checked against float64 before it is timed; times are taken in turn.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    help_of = {
        "kernels": "layer by layer: our kernels and PyTorch's modules",
        "inference": "the whole network in eval mode",
        "training": "a training step: forward, backward, SGD with momentum",
        "scaling": "time and memory against batch, resolution and width",
        "curves": "losses of a training on the digits, ours and eager PyTorch's",
    }
    for name, text in help_of.items():
        command = commands.add_parser(name, help=text, description=text)
        _add_options(command, name)
        command.set_defaults(run=_measure, bench=name)
    text = "what each activation costs beside ReLU, and a 5x5 kernel beside a 3x3 one"
    command = commands.add_parser("activations", help=text, description=text)
    _add_options(command, "activations")
    command.set_defaults(run=_activations, bench="activations")
    command = commands.add_parser("compare", help="what changed between two results beyond noise")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command.set_defaults(run=_compare)
    command = commands.add_parser("readme", help="write the README's figures anew from benchmarks/results")
    command.add_argument("--check", action="store_true", help="write nothing; 1 if something would change")
    command.set_defaults(run=lambda args: readme.update(check=args.check))
    return parser


def _add_options(parser: argparse.ArgumentParser, bench: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"[{device}]")
    if bench == "kernels":
        parser.add_argument("--backend", nargs="+", default=["auto"],
                            help="of mobilenet_ext, others beside the first [auto]")  # fmt: skip
    else:
        parser.add_argument("--backend", default="auto", help="of mobilenet_ext [auto]")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="16 bits: autocast "
                        "in training, weights and activations in inference [float32 bfloat16]")  # fmt: skip
    if bench in ("inference", "training"):
        parser.add_argument("--model", nargs="+", default=[MOBILENET_V1], metavar="NAME",
                            help=f"torchvision:NAME or timm:NAME, several in one result [{MOBILENET_V1}]")  # fmt: skip
    if bench != "activations":
        parser.add_argument("--width", nargs="+", type=_positive(float), default=[1.0], help="multiplier [1]")
        parser.add_argument("--resolution", type=_positive(int), default=224, help="[224]")
    batch = {"inference": "1 32 256, on a CPU 1 32", "curves": CURVES_BATCH}.get(bench, "256, on a CPU 32")
    parser.add_argument("--batch", nargs="+", type=_positive(int), help=f"[{batch}]")
    if bench == "curves":
        parser.add_argument("--epochs", type=_positive(int), default=10, help="[10]")
    else:
        effort = comparison.Effort()
        parser.add_argument("--rounds", type=_positive(int), default=effort.rounds,
                            help=f"samples of each runner [{effort.rounds}]")  # fmt: skip
        parser.add_argument("--burst", type=_positive(float), default=effort.burst_s, metavar="SECONDS",
                            help=f"how long a sample takes [{effort.burst_s:g}]")  # fmt: skip
    parser.add_argument("--threads", type=_positive(int), help="of a CPU [torch's choice]")
    if bench in ("inference", "training"):
        parser.add_argument("--peers", nargs="+", metavar="PEER", choices=NAMES, default=list(NAMES),
                            help=f"of {', '.join(map(repr, NAMES))} [all]")  # fmt: skip
    if bench == "kernels":
        parser.add_argument("--passes", nargs="+", choices=kernels.PASSES, default=list(kernels.PASSES))
        names = [name for name in kernels.RUNNERS if name != OURS]
        parser.add_argument("--peers", nargs="*", metavar="PEER", choices=names, default=names,
                            help=f"beside ours, none or some of {', '.join(map(repr, names))} [all]")  # fmt: skip
    if bench == "scaling":
        parser.add_argument("--task", choices=("training", "inference"), default="training")
    if bench not in ("kernels", "curves", "activations"):
        parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out, which takes a process "
                            "of its own for each runner")  # fmt: skip
    parser.add_argument("--fp32-precision", choices=("ieee", "tf32"), default="ieee", help="of products on a GPU")
    if bench == "activations":
        return  # a table to read, and no result that is kept
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--save", action="store_true", help="write it, with pictures, to benchmarks/results/<device>/")


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = kind.__name__
    return parse


def _set_up(args: argparse.Namespace, backend: str) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU")
    mx.backends.set(backend)
    if args.device == "cuda":
        for part in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul):
            part.fp32_precision = args.fp32_precision


def _activations(args: argparse.Namespace) -> int:
    _set_up(args, args.backend)
    effort = comparison.Effort(args.rounds, args.burst)
    found = limits.measure_limits(args.device, args.dtype, min(5, effort.rounds), min(0.1, effort.burst_s))
    for dtype, batch in product(args.dtype, args.batch or TRAINING_BATCH[args.device]):
        for line in activations.measure(batch, dtype, args.device, found[dtype], effort):
            print(line, flush=True)
        print()
    return 0


def _measure(args: argparse.Namespace) -> int:
    backend, *args.others = args.backend if args.bench == "kernels" else [args.backend]
    args.models = _models(args)
    _set_up(args, backend)
    effort = comparison.Effort(
        getattr(args, "rounds", 0), getattr(args, "burst", 0.0), memory=not getattr(args, "no_memory", False)
    )
    report: dict[str, Any] = {"bench": args.bench, "about": results.about(args.device), "limits": {}, "results": []}
    report["command"] = shlex.join(["mobilenet-ext", "bench", *_without_files(args.words)])
    others = args.models != [MOBILENET_V1]
    saved = results.default_file(f"networks-{args.bench}" if others else args.bench, report["about"])
    for path in [args.json] * bool(args.json) + [saved] * args.save:
        results.check_writable(path)  # now, and not after what may take an hour
    if args.bench != "curves":
        found = limits.measure_limits(args.device, args.dtype, min(5, effort.rounds), min(0.1, effort.burst_s))
        report["limits"] = {dtype: of._asdict() for dtype, of in found.items()}
    for dtype in args.dtype:
        for result in _results(args, dtype, effort):
            report["results"].append(result)
            if args.bench != "curves":
                print(f"    {table.one_line(result['rows'])}", file=sys.stderr, flush=True)
            if args.json:  # as it grows, so that a run that is cut off leaves what it has
                results.write(args.json, report)
    print(table.heading(report))
    print(table.tables(report))
    if args.save:
        results.write(saved, report)
        for picture in pictures.draw(report, saved):
            print(picture)
    ours = [row for result in report["results"] for row in result["rows"] if is_ours(row["runner"])]
    return 1 if any("refused" in row for row in ours) else 0


def _results(args: argparse.Namespace, dtype: str, effort: comparison.Effort) -> Iterator[Any]:
    task = {"inference": "inference", "scaling": getattr(args, "task", "training")}.get(args.bench, "training")
    batches = (INFERENCE_BATCHES if args.bench == "inference" else TRAINING_BATCH)[args.device]
    if args.bench == "curves":
        batches = [CURVES_BATCH]
    for model, width, batch in product(args.models, args.width, args.batch or batches):
        work = Workload(task, width, args.resolution, batch, dtype, args.device, model)
        print(work, file=sys.stderr, flush=True)
        if args.bench == "kernels":
            for pass_ in args.passes:
                yield from kernels.compare_layers(work, pass_, args.peers, effort, args.others)
        elif args.bench == "scaling":
            yield from scaling.measure_scaling(work, effort)
        elif args.bench == "curves":
            yield curves.compare_training(work, args.epochs)
        else:
            yield comparison.compare_runners(work, args.peers, effort)


def _models(args: argparse.Namespace) -> list[str]:
    """The networks to measure.

    Raises:
        ValueError: there is none of this name, or it has no width.
    """
    models = getattr(args, "model", [MOBILENET_V1])
    for name in models:
        if name != MOBILENET_V1:
            if args.width != [1.0]:
                raise ValueError(f"--width: only {MOBILENET_V1} has one, not {name}")
            libraries.check(name)
    return models


def _without_files(words: list[str]) -> list[str]:
    """The words that reproduce a run, those that choose files left out."""
    kept = [word for word, before in zip(words, ["", *words[:-1]], strict=True) if before != "--json"]
    return [word for word in kept if word not in ("--json", "--save")]


def _compare(args: argparse.Namespace) -> int:
    print(compare_module.report(results.read(args.before), results.read(args.after)))
    return 0
