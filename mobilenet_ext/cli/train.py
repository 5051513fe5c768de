"""``mobilenet-ext train``: train MobileNetV1."""

from __future__ import annotations

import argparse
import dataclasses

from mobilenet_ext.cli import options
from mobilenet_ext.train.recipe import default_recipe
from mobilenet_ext.train.run import recorded_recipe, run_training


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``train`` to the command line's subcommands."""
    parser = subparsers.add_parser(
        "train",
        help="train MobileNetV1",
        description="Trains MobileNetV1. Without arguments: width 0.25 on scikit-learn's digits. Ctrl-C ends the run "
        "after the current batch; --resume goes on with it.",
    )
    parser.add_argument("--width", type=float, help="width multiplier [1.0; digits: 0.25]")
    parser.add_argument("--out", metavar="DIR", help="folder for checkpoints, metrics and curves [runs/DATA-wWIDTH]")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out; its recipe need not be given again"
    )
    options.add_recipe_options(parser)
    options.add_run_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Trains; 0 when the run is done, 130 when Ctrl-C ended it."""
    options.require_out(args)
    given = options.given_settings(args, "width")
    # A resumed run keeps its recipe; settings given again are held against it.
    recipe = dataclasses.replace(recorded_recipe(args.out), **given) if args.resume else default_recipe(**given)
    run_options = options.run_options(args)
    out = args.out or options.free_folder(f"{options.data_name(recipe.data)}-w{recipe.width:g}")
    result = run_training(recipe, out, run_options, resume=args.resume)
    return 130 if result.interrupted else 0
