"""``mobilenet-ext sweep``: train MobileNetV1 at several widths."""

from __future__ import annotations

import argparse

from mobilenet_ext.cli import options
from mobilenet_ext.train.recipe import default_recipe
from mobilenet_ext.train.sweep import run_sweep

WIDTHS = (1.0, 0.75, 0.5, 0.25)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``sweep`` to the command line's subcommands."""
    parser = subparsers.add_parser(
        "sweep",
        help="train MobileNetV1 at several widths and compare",
        description="Trains each width with the same recipe. Leaves a run per width, a table (sweep.md, sweep.json) "
        "and the curves of all widths in one picture (sweep.png).",
    )
    parser.add_argument(
        "--widths", type=float, nargs="+", default=list(WIDTHS), metavar="W", help="width multipliers [1 0.75 0.5 0.25]"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for the runs, the table and the picture [runs/DATA-sweep]")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the sweep in --out, given the same recipe options"
    )
    options.add_recipe_options(parser)
    options.add_run_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Trains; 0 when every width is done, 130 when Ctrl-C ended the sweep."""
    options.require_out(args)
    given = options.given_settings(args)
    # All at once and first: a wrong width shows before the hours that the right ones take.
    recipes = [default_recipe(**{**given, "width": width}) for width in dict.fromkeys(args.widths)]
    run_options = options.run_options(args)
    out = args.out or options.free_folder(f"{options.data_name(recipes[0].data)}-sweep")
    _, interrupted = run_sweep(recipes, out, run_options, resume=args.resume)
    return 130 if interrupted else 0
