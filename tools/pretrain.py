"""Train a model; without arguments the demo job of the README. The same as `apr pretrain`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apr.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("pretrain", sys.argv[1:]))
