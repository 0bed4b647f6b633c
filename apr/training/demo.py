"""Choose the dtype of the demo job: of those that reach the same loss, the one that ends sooner on this processor."""

from __future__ import annotations

from types import ModuleType

from .settings import DEMO, Settings

# path of the cpu backend -> what multiplies bfloat16 there
INSTRUCTIONS = {"amx": "AMX tiles", "avx512_bf16": "AVX512-BF16"}


def is_demo(s: Settings) -> bool:
    """Tell the demo job, whatever its seed, folder and device, from one with other settings."""
    return all(getattr(s, key) == value for key, value in DEMO.items())


def choose_dtype(s: Settings, backend: ModuleType, processes: int) -> tuple[str, str]:
    """Choose the dtype where the settings name none; returns it, and the reason of a choice that only the demo has, or "".

    On a CPU the demo is in bfloat16 where the processor multiplies it. All else, several processes, which may stand on
    processors of several kinds, and the demo elsewhere keep the backend's first dtype."""
    first = str(backend.dtypes[0])
    if s.dtype or backend.name != "cpu" or processes > 1 or not is_demo(s):
        return s.dtype or first, ""
    from ..backends.cpu import tiles

    if name := INSTRUCTIONS.get(tiles.path()):
        return "bfloat16", (
            f"bfloat16 chosen for the demo: products on {name} end it sooner, at the same loss;\n"
            "--dtype float32 overrides"
        )
    return first, f"{first} chosen for the demo: this processor multiplies bfloat16 as float32, so no sooner"
