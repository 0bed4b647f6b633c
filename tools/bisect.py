"""Find the op that is wrong. The same as `apr bisect`.

Python puts the folder of a script on its path, so the tools beside this file find it where they look for Python's module
`bisect`: it gives what that module gives.
"""

import sys
from _bisect import bisect_left, bisect_right, insort_left, insort_right
from pathlib import Path

bisect, insort = bisect_right, insort_right
__all__ = ["bisect", "bisect_left", "bisect_right", "insort", "insort_left", "insort_right"]

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

    from apr.cli.main import run_command

    sys.exit(run_command("bisect", sys.argv[1:]))
