"""``mobilenet-ext sweep``: train MobileNetV1 at several widths, or several networks."""

from __future__ import annotations

import argparse

from mobilenet_ext.cli import options
from mobilenet_ext.train.recipe import MOBILENET_V1, default_recipe
from mobilenet_ext.train.sweep import run_sweep

WIDTHS = (1.0, 0.75, 0.5, 0.25)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``sweep`` to the command line's subcommands."""
    parser = subparsers.add_parser(
        "sweep",
        help="train MobileNetV1 at several widths, or several networks, and compare",
        description="Trains each width, or each network, with the same recipe. Leaves a run for each, a table "
        "(sweep.md, sweep.json) and the curves of all in one picture (sweep.png).",
    )
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument(
        "--widths", type=float, nargs="+", default=WIDTHS, metavar="W", help="of MobileNetV1 [1 0.75 0.5 0.25]"
    )
    compared.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help=f"networks instead of widths, as `train --model`: {MOBILENET_V1}, torchvision:NAME, timm:NAME",
    )
    parser.add_argument("--out", metavar="DIR", help="folder for the runs, the table and the picture [runs/DATA-sweep]")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the sweep in --out, given the same recipe options"
    )
    options.add_recipe_options(parser)
    options.add_run_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Trains; 0 when all are done, 130 when Ctrl-C ended the sweep."""
    options.require_out(args)
    given = options.given_settings(args)
    # All at once and first: a wrong one shows before the hours that the right ones take.
    name, values = ("model", args.models) if args.models else ("width", args.widths)
    recipes = [default_recipe(**given, **{name: value}) for value in dict.fromkeys(values)]
    run_options = options.run_options(args)
    out = args.out or options.free_folder(f"{options.data_name(recipes[0].data)}-sweep")
    _, interrupted = run_sweep(recipes, out, run_options, resume=args.resume)
    return 130 if interrupted else 0
