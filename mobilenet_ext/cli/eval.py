"""``mobilenet-ext eval``: measure a checkpoint on validation images."""

from __future__ import annotations

import argparse

from mobilenet_ext.cli import options
from mobilenet_ext.train.inference import evaluate_checkpoint
from mobilenet_ext.train.process_state import use_backend


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``eval`` to the command line's subcommands."""
    parser = subparsers.add_parser(
        "eval",
        help="measure a checkpoint on validation images",
        description="Prints loss, top-1 and top-5 accuracy and the accuracy of each class on the validation images "
        "that belong to the checkpoint's training images.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument(
        "--data", metavar="imagenette|digits|PATH", help="other data with the same classes [that of the training]"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="[that of the training]")
    options.add_run_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the measurements."""
    run_options = options.run_options(args)
    with use_backend(run_options.backend):
        stats, smoothing, classes = evaluate_checkpoint(
            args.checkpoint, run_options, data=args.data, batch_size=args.batch_size
        )
    print(f"loss   {stats.loss:.4f}" + (f"  (label smoothing {smoothing:g})" if smoothing else ""))
    print(f"top-1  {stats.accuracy:.4f}")
    print(f"top-5  {stats.top5_accuracy:.4f}")
    print(f"{stats.images} images, {stats.images_per_second:.0f} images/s\n")
    width = max(len("class"), *map(len, classes))
    print(f"{'class':<{width}}  accuracy  images")
    for name, correct, images in zip(classes, stats.class_correct, stats.class_images, strict=True):
        accuracy = f"{correct / images:.4f}" if images else "-"
        print(f"{name:<{width}}  {accuracy:>8}  {images:>6}")
    return 0
