"""A trace as `apr trace` writes it, of the implementation in Hugging Face transformers: the same names, fewer taps.

Stock eager attention, on the CPU. torch and transformers are imported only when a trace is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import parameters
from ..checkpoints.registry import open_any
from ..checkpoints.tensors import EMBED, HEAD
from ..common.errors import DeviceError, Refused
from ..common.packages import pip_install
from ..model.config import ModelConfig
from ..model.families import layers_of
from ..model.hf_config import to_hf
from ..model.params import Layout
from ..model.transformer import IGNORED

DTYPES = ("float64", "float32")
# parameter of a block -> the tap that the output of its module is, or a part of, in this order
OUTPUTS = {
    "attn_norm": "norm1",
    "wq": "qkv",
    "wk": "qkv",
    "wv": "qkv",
    "q_norm": "qk",
    "k_norm": "qk",
    "wo": "att_out",
    "attn_post_norm": "post1",
    "mlp_norm": "norm2",
    "wgate": "gu",
    "wup": "gu",
    "wdown": "mlp_out",
    "mlp_post_norm": "post2",
}
# parameter of a block -> the tap that the input of its module is
INPUTS = {"wo": "att", "mlp_norm": "res2", "wdown": "act"}


def trace_of(
    path: str, ids: np.ndarray, targets: np.ndarray, dtype: str = "float64", gradients: bool = True
) -> dict[str, np.ndarray]:
    """The trace of a checkpoint, whatever its format. A Hugging Face folder's config.json is read by transformers.

    Other parameters as in trace_of_weights. Raises as registry.open_any does, DeviceError, Refused.
    """
    loaded = open_any(path)
    weights = parameters(Layout(loaded.cfg), loaded)
    if loaded.kind != "hf":
        return trace_of_weights(loaded.cfg, weights, ids, targets, dtype, gradients)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    transformers = _modules()[1]
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return _trace(config, loaded.cfg, weights, ids, targets, dtype, gradients)


def trace_of_weights(
    cfg: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    ids: np.ndarray,
    targets: np.ndarray,
    dtype: str = "float64",
    gradients: bool = True,
) -> dict[str, np.ndarray]:
    """The trace of any model that apr computes.

    tensors: every parameter by its Hugging Face name (Layout.named). ids, targets (B,T), negative targets are left out.
    dtype: float64, or float32 as transformers does it: its rotary angles are float32 then, which at position t is an
    error of about t * 2^-24. gradients: also "d_..." of activations and "grad.NAME" of parameters, of the mean loss.
    Not for several threads. Raises DeviceError without torch and transformers, Refused.
    """
    transformers = _modules()[1]
    config = transformers.CONFIG_MAPPING[cfg.family].from_dict(to_hf(cfg))
    return _trace(config, cfg, tensors, ids, targets, dtype, gradients)


def _modules() -> tuple[Any, Any]:
    """torch and transformers."""
    try:
        import torch
        import transformers
    except ImportError as e:
        raise DeviceError(
            f"a comparison with Hugging Face needs torch and transformers ({e}); {pip_install('torch', 'transformers')}"
        ) from None
    return torch, transformers


def _trace(
    config: Any,
    cfg: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    ids: np.ndarray,
    targets: np.ndarray,
    dtype: str,
    gradients: bool,
) -> dict[str, np.ndarray]:
    _check(cfg, ids, targets, dtype)
    torch, _ = _modules()
    with _float32_is(dtype):
        model = _stock(config, tensors, dtype)
        seen = _Seen(model, cfg, gradients)
        with torch.set_grad_enabled(gradients):
            logits = model(torch.from_numpy(ids.astype(np.int64)), use_cache=False).logits
            seen.keep("logits", 0, logits)
            wanted = torch.from_numpy(np.where(targets < 0, IGNORED, targets).astype(np.int64))
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
            )
            loss = losses.sum() / int((targets >= 0).sum())
        if gradients:
            loss.backward()
    out = seen.values()
    out |= {"loss_rows": losses.reshape(ids.shape), "loss": loss.reshape(1)}
    if gradients:
        out |= seen.gradients()
        out |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    wrong = [name for name, x in out.items() if str(x.dtype) != f"torch.{dtype}"]
    if wrong:
        raise Refused(
            f"this version of transformers computes {wrong[0]} in {out[wrong[0]].dtype}, not in {dtype}"
        )
    return {name: x.detach().numpy().copy() for name, x in out.items()}


def _check(cfg: ModelConfig, ids: np.ndarray, targets: np.ndarray, dtype: str) -> None:
    if dtype not in DTYPES:
        raise Refused(f"a Hugging Face trace is of dtype {' or '.join(DTYPES)}, not {dtype}")
    if ids.ndim != 2 or ids.shape != targets.shape:
        raise Refused(f"ids {ids.shape}, targets {targets.shape}: both must be (B,T)")
    if ids.min() < 0 or max(ids.max(), targets.max()) >= cfg.vocab_size:
        raise Refused(f"ids or targets outside the vocabulary of {cfg.vocab_size}")
    if not (targets >= 0).any():
        raise Refused("no target to compute a loss of: all are ignored")


@contextmanager
def _float32_is(dtype: str) -> Iterator[None]:
    """Inside, `torch.float32` and `torch.float` name `dtype`.

    RMSNorm, softmax and rotary embedding of transformers cast to torch.float32 by name: they would round a
    float64 run.
    """
    torch, _ = _modules()
    saved = torch.float32, torch.float
    torch.float32 = torch.float = getattr(torch, dtype)
    try:
        yield
    finally:
        torch.float32, torch.float = saved


def _stock(config: Any, tensors: Mapping[str, np.ndarray], dtype: str) -> Any:
    """The stock model with these weights; inside _float32_is."""
    torch, transformers = _modules()
    kind = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation="eager")
    state = {name: torch.from_numpy(np.array(x, dtype)) for name, x in tensors.items()}
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBED]
    model.load_state_dict(state, strict=True)
    rounded = model.model.rotary_emb.inv_freq.dtype
    if rounded != kind:
        raise Refused(f"this version of transformers keeps rotary frequencies in {rounded}, not in {dtype}")
    return model.eval()


class _Seen:
    """Hooks a model and keeps its tensors by the names of taps, in order of computation."""

    def __init__(self, model: Any, cfg: ModelConfig, gradients: bool) -> None:
        self.retain = gradients
        self.parts: dict[str, dict[int, Any]] = {}
        # taps whose gradient is that of the residual stream
        self.without_gradient: set[str] = set()
        inner = model.model
        self._hook(inner.embed_tokens, outputs=("hidden.0", 0))
        modules = dict(model.named_modules())
        order = list(OUTPUTS)
        for s in Layout(cfg).in_order():
            name, module = s.param.name, modules.get(s.hf.removesuffix(".weight"))
            if s.layer is None or module is None:
                continue
            self._hook(module, outputs=(f"{s.layer}.{OUTPUTS[name]}", order.index(name)))
            if name in INPUTS:
                self._hook(module, inputs=(f"{s.layer}.{INPUTS[name]}", 0))
        for i, (block, layer) in enumerate(zip(inner.layers, layers_of(cfg), strict=True)):
            if not layer.mlp_norm:
                self._hook(block.mlp, inputs=(f"{i}.res2", 0))
            self.without_gradient |= {f"{i}.{'post1' if layer.attn_post_norm else 'att_out'}"}
            self.without_gradient |= {f"{i}.{'post2' if layer.mlp_post_norm else 'mlp_out'}"}
            self._hook(block, outputs=(f"hidden.{i + 1}", 0))
        self._hook(inner.norm, outputs=("final_norm", 0))

    def _hook(
        self, module: Any, inputs: tuple[str, int] | None = None, outputs: tuple[str, int] | None = None
    ) -> None:
        def hook(module: Any, given: Any, made: Any) -> None:
            if inputs:
                self.keep(*inputs, given[0])
            if outputs:
                self.keep(*outputs, made[0] if isinstance(made, tuple) else made)

        module.register_forward_hook(hook)

    def keep(self, tap: str, order: int, x: Any) -> None:
        """Part number `order` of a tap."""
        if self.retain:
            x.retain_grad()
        self.parts.setdefault(tap, {})[order] = x

    def values(self) -> dict[str, Any]:
        """The taps; parts are joined along axis 2, features or heads."""
        return {tap: _joined([x for _, x in sorted(parts.items())]) for tap, parts in self.parts.items()}

    def gradients(self) -> dict[str, Any]:
        """Their gradients, after backward, as d_TAP."""
        out = {}
        for tap, parts in self.parts.items():
            layer, dot, name = tap.rpartition(".") if tap[0].isdigit() else ("", "", tap)
            if tap not in self.without_gradient:
                out[f"{layer}{dot}d_{name}"] = _joined([x.grad for _, x in sorted(parts.items())])
        return out


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else _modules()[0].cat(parts, 2)
