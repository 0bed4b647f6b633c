"""`python -m apr COMMAND`: what the command `apr` does."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
