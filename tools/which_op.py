"""Find the op that is wrong. The same as `apr bisect`.

Not called bisect.py: Python puts a script's folder on its path, where that name would hide the standard library's module.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apr.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("bisect", sys.argv[1:]))
