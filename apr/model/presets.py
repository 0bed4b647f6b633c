"""Configurations by name: tiny ones for tests, small ones for two CPU cores, published models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..common.errors import InputNotFound
from ..common.files import read_json
from ..common.run_paths import instead_of
from .config import ModelConfig
from .families import FAMILIES
from .hf_config import from_hf, hf_notes
from .rope_scaling import Llama3Scaling


def _preset(family: str, sizes: str, **more: Any) -> ModelConfig:
    """Configuration of a family; sizes: "V C F L H K D positions"."""
    v, c, f, n, h, k, d, t = map(int, sizes.split())
    block = FAMILIES[family].block
    base = dict(rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True)
    return ModelConfig(
        family=family,
        vocab_size=v,
        hidden_size=c,
        intermediate_size=f,
        num_layers=n,
        num_heads=h,
        num_kv_heads=k,
        head_dim=d,
        max_position_embeddings=t,
        qkv_bias=block.qkv_bias,
        qk_norm=bool(block.qk_norm),
        **{**base, **more},
    )


_QWEN: dict[str, Any] = dict(rms_norm_eps=1e-6, rope_theta=1e6)
_LLAMA32 = Llama3Scaling(32.0, 1.0, 4.0, 8192)

PRESETS: dict[str, ModelConfig] = {
    # tiny sizes for tests: odd on purpose, every switch of its family on
    "llama-tiny": _preset("llama", "123 40 56 2 4 2 10 64"),
    "llama3-tiny": _preset("llama", "123 40 56 2 4 1 10 64", rope_scaling=Llama3Scaling(4.0, 1.0, 4.0, 16)),
    "mistral-tiny": _preset("mistral", "123 40 56 2 4 4 10 64", sliding_window=5, tie_word_embeddings=False),
    "qwen2-tiny": _preset("qwen2", "123 56 72 2 7 1 8 64", **_QWEN),
    "qwen3-tiny": _preset("qwen3", "123 40 56 2 4 2 12 64", **_QWEN),
    "olmo2-tiny": _preset("olmo2", "123 40 56 2 4 2 12 64", rms_norm_eps=1e-6, tie_word_embeddings=False),
    "smollm3-tiny": _preset(
        "smollm3",
        "123 40 56 3 4 2 10 64",
        rope_theta=2e6,
        no_rope_layers=(1,),
        sliding_window=5,
        full_attention_layers=(1, 2),
    ),
    # sizes for two CPU cores
    "llama-demo": _preset("llama", "4096 192 512 4 3 1 64 1024"),
    "qwen2-3m": _preset("qwen2", "2048 192 512 6 6 2 32 1024", **_QWEN),
    "qwen2-15m": _preset("qwen2", "32000 288 768 6 6 6 48 1024", **_QWEN),
    # the models people know
    "llama-370m": _preset("llama", "50257 1024 2816 24 16 4 64 4096"),
    "llama-3.2-1b": _preset(
        "llama", "128256 2048 8192 16 32 8 64 131072", rope_theta=5e5, rope_scaling=_LLAMA32
    ),
    "smollm2-135m": _preset("llama", "49152 576 1536 30 9 3 64 8192", rope_theta=1e5),
    "smollm2-360m": _preset("llama", "49152 960 2560 32 15 5 64 8192", rope_theta=1e5),
    "qwen2.5-0.5b": _preset("qwen2", "151936 896 4864 24 14 2 64 32768", **_QWEN),
    "qwen2.5-1.5b": _preset("qwen2", "151936 1536 8960 28 12 2 128 131072", **_QWEN),
    "qwen3-0.6b": _preset("qwen3", "151936 1024 3072 28 16 8 128 40960", **_QWEN),
}


def load_config(name: str) -> ModelConfig:
    """Configuration of a preset, or of the path of a config.json (or a folder that holds one)."""
    if name in PRESETS:
        return PRESETS[name]
    path = _config_file(name)
    return from_hf(read_json(path), str(path))


def config_notes(name: str) -> list[str]:
    """Read the notes on the config.json that `load_config` reads, as `hf_notes` gives them; [] for a preset."""
    return [] if name in PRESETS else hf_notes(read_json(_config_file(name)), name)


def _config_file(name: str) -> Path:
    path = Path(name)
    if os.path.isdir(path):
        path = path / "config.json"
    if (path.parent / "ckpt").is_dir() and (instead := instead_of(path)):
        raise InputNotFound(f"{name}: is of a run, not the config.json of a model; with --init, {instead}")
    if path.suffix in (".apr", ".gguf") and path.is_file():
        raise InputNotFound(f"{name}: holds weights; give it as --init to start from them, or as MODEL")
    if not os.path.isfile(path):
        raise InputNotFound(f"{name}: neither a preset nor a config.json. Presets: {', '.join(PRESETS)}")
    return path
