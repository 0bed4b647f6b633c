"""Models with a fault of the catalogue, for the checks of checks.py."""

from __future__ import annotations

from typing import Any

from apr.bisect.planted.fault import Fault
from apr.model.config import ModelConfig
from apr.model.transformer import Model
from cases import Backend
from checks import END, Build, on


def planted(fault: Fault, be: Backend) -> Build:
    """Builds models with the fault on a backend."""

    def build(cfg: ModelConfig, dtype: str, **options: Any) -> Model:
        believed = fault.config(cfg)
        if fault.documents:
            options["document_end"] = END
        return on(fault.backend(be, believed))(believed, dtype, **options)

    return build
