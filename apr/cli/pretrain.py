"""`apr pretrain`: train a model from raw text or token shards. Without arguments: the demo job."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..common.finding import exit_code
from ..training.run import train
from ..training.settings import Settings, from_command_line
from .show import Show

Flags = Settings


def main(args: Sequence[str]) -> int:
    """Run the job that the arguments describe; returns the exit code. Errors are raised."""
    settings, explicit = from_command_line(args)
    result = train(settings, Show(quiet=settings.json), explicit=explicit)
    if settings.json:
        print(json.dumps(result, indent=2))
    return exit_code(result["verdict"])
