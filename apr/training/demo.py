"""Choose the dtype of the demo job: of those that reach the same loss, the one that ends sooner on this processor."""

from __future__ import annotations

from dataclasses import fields
from types import ModuleType

from .demo_job import DEMO
from .settings import Settings

# path of the cpu backend -> what multiplies bfloat16 there
INSTRUCTIONS = {"amx": "AMX tiles", "avx512_bf16": "AVX512-BF16"}
# Settings that leave the numbers of the demo as they are, or were varied when its loss was measured, beside those that may
# change while a run is resumed. A mode gives defaults of what the demo names.
FREE = {"seed", "device", "dtype", "threads", "micro_batch_size", "mode", "sample", "checkpoint_every"}


def is_demo(s: Settings) -> bool:
    """Tell the demo job, or one that differs in settings that it does not name, from others."""
    return all(getattr(s, key) == value for key, value in DEMO.items())


def has_loss_of_demo(s: Settings) -> bool:
    """Tell a job with the numbers of the demo, whatever its seed, folder and device, from one with any other setting."""
    of_demo = Settings(**DEMO)
    decisive = (f.name for f in fields(Settings) if not f.metadata["may_change"] and f.name not in FREE)
    return all(getattr(s, key) == getattr(of_demo, key) for key in decisive)


def choose_dtype(s: Settings, backend: ModuleType, processes: int) -> tuple[str, str]:
    """Choose the dtype where the settings name none; returns it, and the reason of a choice that only the demo has, or "".

    On a CPU the demo is in bfloat16 where the processor multiplies it. All else, several processes, which may stand on
    processors of several kinds, and the demo elsewhere keep the backend's first dtype."""
    first = str(backend.dtypes[0])
    if s.dtype or backend.name != "cpu" or processes > 1 or not has_loss_of_demo(s):
        return s.dtype or first, ""
    from ..backends.cpu import tiles

    if name := INSTRUCTIONS.get(tiles.path()):
        return "bfloat16", (
            f"bfloat16 chosen for the demo: products on {name} end it sooner, at the same loss;\n"
            "--dtype float32 overrides"
        )
    return first, f"{first} chosen for the demo: this processor multiplies bfloat16 as float32, so no sooner"
