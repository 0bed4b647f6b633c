"""`apr trace MODEL`: write every intermediate of one forward (and backward) pass as a safetensors file.

Example: apr trace qwen3-tiny --tokens 1,2,3,4 --backward -o trace.safetensors"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from .. import backends
from ..backends.select import select
from ..bisect.token_ids import read_ids, read_targets
from ..bisect.traces import record
from ..checkpoints.hf import write_safetensors
from ..checkpoints.registry import open_host
from ..common.atomic import try_output
from ..common.errors import Refused, UsageError
from ..common.options import device_option, json_option, option, parse, threads_option
from ..common.printable import printable
from ..common.provenance import versions
from ..common.units import plural
from ..model.cost import check_fits, memory
from ..model.hf_config import to_hf
from ..model.presets import PRESETS
from ..model.transformer import Model


@dataclass(frozen=True)
class Flags:
    """Options of `apr trace`."""

    model: str = option(
        "an .apr or GGUF file, a Hugging Face folder, or a preset (random weights)",
        positional=True,
        path=True,
        names=tuple(PRESETS),
    )
    tokens: str = option(
        'ids: "1,2,3", or a .json or .npy file of one row or (B,T)', "", needed=True, metavar="IDS", path=True
    )
    output: str = option(
        "the safetensors file to write", "", needed=True, short="o", metavar="FILE", path=True
    )
    backend: str = option("reference, cpu or cuda", "", choices=backends.NAMES)
    device: str = device_option("auto, cpu, cuda or cuda:N; chooses the backend where --backend does not")
    dtype: str = option(
        "default: float64 on reference, float32 on cpu, bfloat16 on cuda",
        "",
        choices=("float64", "float32", "bfloat16"),
    )
    backward: bool = option("also all gradients, of the mean loss", False)
    targets: str = option(
        "file of targets (B,T), -100 ignored (default: the next tokens)", "", metavar="FILE", path=True
    )
    threads: int | None = threads_option()
    seed: int = option("seed of a preset's random weights", 42, at_least=0)
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr trace", __doc__ or "")
    if f.backend and f.device != "auto" and not f.device.startswith(f.backend):
        raise UsageError(f"--backend {f.backend} and --device {f.device} are not the same; give one of them")
    if f.backend == "reference":
        backend = backends.get("reference")
    else:
        backend = select(f.device if f.device != "auto" else f.backend or "auto", f.dtype or None, f.threads)
    dtype = f.dtype or backend.dtypes[0]
    if dtype not in backend.dtypes:
        raise Refused(f"--dtype {dtype}: the {backend.name} backend computes in {', '.join(backend.dtypes)}")
    try_output(f.output)
    source = open_host(f.model, dtype, f.seed)
    ids = read_ids(f.tokens, source.cfg.vocab_size, "--tokens", lowest=0)
    targets = read_targets(f.targets, ids, source.cfg.vocab_size)
    batch, seq = ids.shape
    need = memory(source.cfg, backend, batch, seq, dtype, f.backward, ids.size, optimizer=None)
    check_fits(need, backend, "trace fewer tokens or a smaller model")
    weights = source.on(backend, dtype)
    model = Model(source.cfg, backend, batch, seq, dtype, f.backward, ids.size, w=weights)
    tensors = record(model, ids, targets) | {"ids": ids, "targets": targets}
    facts = {
        "model": f.model,
        "model_sha256": source.sha256,
        "backend": backend.name,
        "dtype": dtype,
        "config": json.dumps(to_hf(source.cfg)),
        "versions": json.dumps(versions()),
    }
    write_safetensors(f.output, tensors, metadata=facts, finite=False)
    loss = tensors["loss"]
    result = {"output": f.output, "tensors": len(tensors), "loss": float(loss[0]), **facts}
    if f.json:
        print(json.dumps(result))
    else:
        words = (
            f"{plural(len(tensors), 'tensor')}, backend {backend.name} {dtype}, loss {loss[0]:.6f} nats/token"
        )
        print(printable(f"{f.output}: {words}"))
    return 0
