"""``mobilenet-ext predict``: classify image files."""

from __future__ import annotations

import argparse
import sys

from mobilenet_ext.cli import options
from mobilenet_ext.train.decoding import UnreadableImage
from mobilenet_ext.train.errors import TrainError
from mobilenet_ext.train.inference import Classifier
from mobilenet_ext.train.process_state import use_backend


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``predict`` to the command line's subcommands."""
    parser = subparsers.add_parser(
        "predict",
        help="classify image files",
        description="Prints the best classes of each image and their probabilities. Images are prepared as in "
        "validation: shorter side resized, centre cut out. (The digits are white on black.)",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to print [5]")
    options.add_device_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the classes of each image; 1 where an image could not be read, after the others."""
    if args.top < 1:
        raise TrainError(f"--top must be 1 or more, not {args.top}")
    status = 0
    with use_backend(args.backend):
        classifier = Classifier(args.checkpoint, options.device_of(args))
        for path in args.images:
            try:
                best = classifier.best_classes(path, args.top)
            except UnreadableImage as error:
                print(f"mobilenet-ext: cannot read the image {error}", file=sys.stderr)
                status = 1
                continue
            print(path)
            for name, chance in best:
                print(f"  {chance:.4f}  {name}")
    return status
