"""`apr pretrain`: train a model from raw text or token shards. Without arguments: the demo job."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from ..backends.cuda.driver import Driver, DriverError
from ..common.errors import DeviceError, UsageError
from ..common.finding import exit_code
from ..common.units import plural
from ..ranks.launch import joined, start, start_gpus
from ..ranks.library import SHARED
from ..training.display import Display
from ..training.run import train
from ..training.settings import Settings, from_command_line
from .show import Show

Flags = Settings


def main(args: Sequence[str]) -> int:
    """Run the job that the arguments describe; returns the exit code. Errors are raised."""
    with joined(args) as ranks:
        settings, explicit = from_command_line(args)
        if ranks.count == 1 and settings.gpus and (count := _gpus(settings)) > 1:
            return start_gpus(count, args)
        if ranks.count == 1 and settings.ranks is not None and settings.ranks > 1:
            return start(settings.ranks, args)
        show: Display = Display() if ranks.rank else Show(quiet=settings.json)
        result = train(settings, show, explicit=explicit, ranks=ranks)
        if not result:
            return 0
        if settings.json:
            print(json.dumps(result, indent=2))
    return exit_code(result["verdict"])


def _gpus(settings: Settings) -> int:
    """Count the GPUs that are asked for. Raises UsageError, Refused."""
    asked = str(settings.gpus)
    if settings.device == "cpu" or ":" in settings.device:
        raise UsageError(
            f"--gpus {asked} and --device {settings.device}: --gpus takes GPUs from cuda:0 on; leave --device out"
        )
    if settings.ranks:
        raise UsageError(
            f"--ranks {settings.ranks} and --gpus {asked}: ranks are processes on the CPU, or GPUs; give one"
        )
    if asked != "all" and not (asked.isascii() and asked.isdigit() and int(asked)):
        raise UsageError(f"--gpus {asked} is no number of GPUs: 1 or more, or all")
    try:
        found = len(Driver().gpus())
    except (OSError, DriverError) as e:
        raise DeviceError(
            f"--gpus {asked}: no GPU can be used: {e}; --device cpu computes without one"
        ) from None
    if found == 0 or (asked != "all" and int(asked) > found and not os.environ.get(SHARED)):
        raise DeviceError(
            f"--gpus {asked}: this process sees {plural(found, 'GPU')}; nvidia-smi lists those of the machine, and "
            "CUDA_VISIBLE_DEVICES hides some"
        )
    return found if asked == "all" else int(asked)
