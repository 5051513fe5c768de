"""The command line: ``mobilenet-ext`` and ``python -m mobilenet_ext``. One module a subcommand.

Each module has ``add_parser(subparsers)``, which returns the parser of its subcommand, and ``run(args)``, which returns
the exit status.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from mobilenet_ext.cli import bench, doctor, eval, predict, sweep, train
from mobilenet_ext.train.errors import TrainError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 0, 1 for an error, 2 for a wrong use, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="mobilenet-ext", description="Train, measure and use MobileNetV1 and other networks on fused kernels."
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (train, sweep, eval, predict, bench, doctor):
        command.add_parser(subparsers).set_defaults(run=command.run)
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files and classes are bytes, of any encoding
    try:
        status = args.run(args)
        if sys.stdout is not None:  # None: started with its output closed
            sys.stdout.flush()
        return status
    except TrainError as error:
        print(f"mobilenet-ext: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mobilenet-ext: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output (head, less) is gone. Python would stumble over it once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
