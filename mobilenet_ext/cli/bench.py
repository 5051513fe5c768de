"""``mobilenet-ext bench``: the benchmarks of the source checkout (``benchmarks/``)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mobilenet_ext

CHECKOUT = Path(mobilenet_ext.__file__).parent.parent


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``bench`` to the command line's subcommands."""
    # What follows is parsed in the checkout, which an installed package may not have. So no word is an option here, not
    # even --help.
    parser = subparsers.add_parser(
        "bench", help="time the kernels and networks against their peers", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def run(args: argparse.Namespace) -> int:
    """Hands over to ``benchmarks/cli.py``; 2 where there is no checkout."""
    if not (CHECKOUT / "benchmarks" / "cli.py").is_file():
        print(
            f"mobilenet-ext: the benchmarks are in the source checkout, and {CHECKOUT} is none: "
            "clone the repository and run `pip install -e .` there",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(CHECKOUT))
    from benchmarks import cli

    return cli.main(args.arguments)
