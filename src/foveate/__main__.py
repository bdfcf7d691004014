"""`python -m foveate` is the command `foveate`."""

import sys

from foveate.cli import main

if __name__ == "__main__":
    sys.exit(main())
