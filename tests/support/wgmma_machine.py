"""What stands for launch.py where kernels of attention_wgmma run on the host: a GPU of few multiprocessors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from apr.backends.cuda import kernels
from apr.backends.cuda.arguments import Arguments
from host_shim import Library, host_map, on_the_host
from kernel_rows import WGMMA

MULTIPROCESSORS = 3  # so few that a block works on several tiles
DYNAMIC = "extern __shared__ __align__(1024) unsigned char shared[];"


class Machine:
    """Stands for _launch.py: kernels of one text of attention_wgmma, compiled when they are first launched."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.seed = folder, 0
        self.texts = {WGMMA: on_the_host(text, "wgmma_shim.h")}
        self.libraries: dict[Any, Library] = {}

    def library(self, module: str, **defines: int) -> Library:
        key = module, *defines.values()
        if key not in self.libraries:
            if module not in self.texts:  # that of attention_dkv_sum
                text = on_the_host(kernels.source(module), "mma_shim.h")
                self.texts[module] = text.replace(
                    DYNAMIC, "unsigned char* const shared = shim::shared_base();"
                )
            names = list(kernels.signatures(module))
            self.libraries[key] = Library(self.texts[module], names, "bfloat16", defines, self.folder)
        return self.libraries[key]

    def kernel(self, module: str, name: str, act: str, **defines: int) -> Callable[..., None]:
        check = Arguments(name, kernels.signatures(module)[name], act, np.ndarray)

        def launch(grid: Any, block: Any, args: tuple[Any, ...], shared: int = 0) -> None:
            self.seed += 1
            self.library(module, **defines)(name, grid, block, check(args), shared, self.seed)

        return launch

    def scratch(self, shape: tuple[int, ...], dtype: str, slot: str) -> Any:
        return np.full(shape, np.nan, dtype)

    def multiprocessors(self) -> int:
        return MULTIPROCESSORS

    tensor_map = staticmethod(host_map)


def compile_all(wanted: Iterable[tuple[Machine, dict[str, int]]]) -> None:
    """Compile variants of machines, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(machine.library, WGMMA, **defines) for machine, defines in wanted]:
            job.result()
