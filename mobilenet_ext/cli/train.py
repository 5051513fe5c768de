"""``mobilenet-ext train``: train MobileNetV1 or another network."""

from __future__ import annotations

import argparse
import dataclasses

from mobilenet_ext.cli import options
from mobilenet_ext.train.recipe import MOBILENET_V1, Recipe, default_recipe
from mobilenet_ext.train.run import check_recipe, recorded_recipe, run_training


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``train`` to the command line's subcommands."""
    parser = subparsers.add_parser(
        "train",
        help="train MobileNetV1 or another network",
        description="Trains MobileNetV1, or a network of torchvision or timm. Without arguments: MobileNetV1 of width "
        "0.25 on scikit-learn's digits. Ctrl-C ends the run after the current batch; --resume goes on with it.",
    )
    parser.add_argument(
        "--model",
        metavar="torchvision:NAME|timm:NAME",
        help=f"network of another library, e.g. torchvision:mobilenet_v2 [{MOBILENET_V1}]",
    )
    parser.add_argument("--width", type=float, help=f"width multiplier of {MOBILENET_V1} [1.0; digits: 0.25]")
    parser.add_argument(
        "--init",
        metavar="FILE",
        help="weights to start from: a checkpoint of a run, or a .pth or .safetensors file of the same network; a head "
        "for another number of classes starts with random weights",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder for checkpoints, metrics and curves [runs/DATA-wWIDTH or runs/DATA-NAME]"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out; its recipe need not be given again"
    )
    options.add_recipe_options(parser)
    options.add_run_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Trains; 0 when the run is done, 130 when Ctrl-C ended it."""
    options.require_out(args)
    given = options.given_settings(args, "model", "width")
    if args.resume:  # the run keeps its recipe; settings given again are held against it
        check_recipe(args.out, given)
        recipe = dataclasses.replace(recorded_recipe(args.out), **given)
    else:
        recipe = default_recipe(**given)
    run_options = options.run_options(args)
    out = args.out or options.free_folder(f"{options.data_name(recipe.data)}-{_short_name(recipe)}")
    result = run_training(recipe, out, run_options, resume=args.resume, init=args.init)
    return 130 if result.interrupted else 0


def _short_name(recipe: Recipe) -> str:
    return f"w{recipe.width:g}" if recipe.model == MOBILENET_V1 else recipe.model.partition(":")[2]
