"""``python -m mobilenet_ext`` is ``mobilenet-ext``."""

import sys

from mobilenet_ext.cli import main

if __name__ == "__main__":  # a worker process that is not forked imports this file
    sys.exit(main())
