"""Write GGUF, the format of llama.cpp, through the package gguf.

What llama.cpp wants other than a Hugging Face folder:

| what              | GGUF                                                                                      |
|-------------------|-------------------------------------------------------------------------------------------|
| names             | token_embd, blk.N.attn_q, ...; a tied head is left out                                    |
| q and k of Llama  | rows reordered: its rotary embedding turns neighbours (2i, 2i+1), ours halves (i, i + D/2) |
| norms and biases  | always float32                                                                            |
| rope scaling      | of Llama 3: a tensor rope_freqs.weight (D/2,) that divides the frequencies; else keys     |
| vocabulary        | as many tokens as the embedding has rows; ids without a token are unused ones             |
| pre-tokenizer     | a name that stands for a rule in llama.cpp's source                                       |

Its architecture `llama` has no sliding window, so a file of a Mistral model with one says that it reads only as many
positions as the window has: within them the two compute the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..common.atomic import atomic_write
from ..common.errors import InputNotFound, Refused, UsageError
from ..common.packages import pip_install
from ..model.config import ModelConfig
from ..model.families import FAMILIES
from ..model.params import Layout, Slot
from ..model.rope import rope_tables
from ..model.rope_scaling import Llama3Scaling
from .gguf_scaling import check_scaling, scaling_keys
from .tensors import BF16, require_finite

ARCHITECTURE = {
    "llama": "llama",
    "mistral": "llama",
    "olmo2": "olmo2",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
# architectures whose rotary embedding turns neighbouring dimensions
ADJACENT = ("llama", "smollm3")
# architectures whose loader asks for heads of hidden_size / num_heads, and those that have no tied head
HEADS_FILL_HIDDEN = ("olmo2", "qwen2")
HEAD_ALONE = ("olmo2",)
# keys of config.json, kept as apr.KEY, of models whose layers differ in the window
WINDOW_KEYS = {"sliding_window", "use_sliding_window", "layer_types"}
# architecture -> n: llama.cpp leaves out the rotary embedding of every n-th layer, and of no other
NO_ROPE_STEP = {"smollm3": 4}
ROPE_FREQS = "rope_freqs.weight"
NAMES = {  # parameter of ours -> tensor; {} is the layer
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "wq": "blk.{}.attn_q.weight",
    "wk": "blk.{}.attn_k.weight",
    "wv": "blk.{}.attn_v.weight",
    "bq": "blk.{}.attn_q.bias",
    "bk": "blk.{}.attn_k.bias",
    "bv": "blk.{}.attn_v.bias",
    "q_norm": "blk.{}.attn_q_norm.weight",
    "k_norm": "blk.{}.attn_k_norm.weight",
    "wo": "blk.{}.attn_output.weight",
    "attn_post_norm": "blk.{}.post_attention_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "wgate": "blk.{}.ffn_gate.weight",
    "wup": "blk.{}.ffn_up.weight",
    "wdown": "blk.{}.ffn_down.weight",
    "mlp_post_norm": "blk.{}.post_ffw_norm.weight",
}
TYPES = ("float32", "float16", "bfloat16", "q8_0")  # what matrices can be written as
FILE_TYPE = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # general.file_type: most matrices are of this type
BLOCK = 32  # values that share a scale in Q8_0
# llama.cpp looks for these in general.name, and then lets special tokens take the spaces beside them, or ends at their absence
NAMES_THAT_CHANGE_TOKENS = ("phi-3", "phi3", "modern-bert")


def package() -> ModuleType:
    """Import the package gguf. Raises InputNotFound where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise InputNotFound(f"writing GGUF files needs the package gguf: {pip_install('gguf')}") from None
    return gguf


def tensor_name(slot: Slot) -> str:
    """Name a parameter as GGUF does."""
    return NAMES[slot.param.name].format(slot.layer)


def to_adjacent(x: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows (heads * D, ...) of q or k from halves to neighbours: row i of the first half goes to 2i of its head."""
    halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(x.shape)


def to_halves(x: np.ndarray, heads: int) -> np.ndarray:
    """Invert to_adjacent."""
    pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(x.shape)


def turned_heads(cfg: ModelConfig, slot: Slot) -> int:
    """Count the heads whose rows change places between the two formats; 0 for a parameter that stays as it is."""
    if ARCHITECTURE[cfg.family] not in ADJACENT:
        return 0
    return {"wq": cfg.num_heads, "bq": cfg.num_heads, "wk": cfg.num_kv_heads, "bk": cfg.num_kv_heads}.get(
        slot.param.name, 0
    )


def frequency_divisors(cfg: ModelConfig) -> np.ndarray | None:
    """Compute what llama.cpp divides the rotary frequencies by, float32 (D/2,); None where it reads no divisors."""
    if not isinstance(cfg.rope_scaling, Llama3Scaling):
        return None
    plain, scaled = (_frequencies(c) for c in (dataclasses.replace(cfg, rope_scaling=None), cfg))
    return (plain / scaled).astype(np.float32)


def _frequencies(cfg: ModelConfig) -> np.ndarray:
    """Read radians per position, float64 (D/2,), off the tables that the model turns by."""
    cos, sin = rope_tables(cfg, 2)
    angles: np.ndarray = np.arctan2(sin[1], cos[1])
    return angles


def type_of(array: np.ndarray, dtype: str | None) -> str:
    """Choose the GGUF type that a parameter is written as."""
    if array.ndim < 2:
        return "F32"
    if dtype is None:
        return {"float16": "F16", "bfloat16": "BF16"}.get(array.dtype.name, "F32")
    if dtype == "q8_0":
        return "Q8_0" if array.shape[-1] % BLOCK == 0 else "F16"
    return {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]


def convert(name: str, array: np.ndarray, kind: str) -> np.ndarray:
    """Convert a parameter to what stands in the file: its own type, or bytes (..., row bytes) for Q8_0.

    Rounding is to nearest. Raises Refused for a value that is not finite, before or after."""
    if kind == "Q8_0":
        wide = array.astype(np.float32)
        require_finite(wide.reshape(-1), 0, name)
        if np.abs(wide).max(initial=0) > 127 * 65504:
            raise Refused(f"{name}: values above {127 * 65504:.3g} do not fit Q8_0, whose scales are float16")
        out: np.ndarray = package().quants.quantize(wide, package().GGMLQuantizationType.Q8_0)
        return out
    with np.errstate(over="ignore"):
        out = array.astype({"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BF16}[kind])
    require_finite(out.reshape(-1), 0, name)
    return out


def write_gguf(
    path: str | Path,
    cfg: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    dtype: str | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    name: str = "",
) -> dict[str, int]:
    """Write a GGUF file, one tensor in memory at a time, in the place of `path`; returns tensors by type.

    tensors: the parameters of cfg by Hugging Face name. dtype: of the matrices, one of TYPES; None keeps theirs (float64
    becomes float32). Norms and biases are float32. vocabulary: keys "tokenizer...." and their values, as `gguf_vocab`
    makes them; None: the file has no tokenizer. Raises Refused for what llama.cpp computes otherwise, IOFailure."""
    if dtype is not None and dtype not in TYPES:
        raise UsageError(f"dtype = {dtype!r}: the matrices of a GGUF file are {', '.join(TYPES)}")
    gguf = package()
    if cfg.family not in ARCHITECTURE:
        raise Refused(
            f"{path}: no architecture of llama.cpp is known for {cfg.family} models; export --format hf"
        )
    arch = ARCHITECTURE[cfg.family]
    check_scaling(cfg, arch, path)
    _check_lengths(cfg, path)
    _check_shapes(cfg, arch, path)
    if cfg.no_rope_layers != _no_rope_layers(arch, cfg.num_layers):
        raise Refused(
            f"{path}: layers {list(cfg.no_rope_layers)} have no rotary embedding; llama.cpp leaves it out of layers "
            f"{list(_no_rope_layers(arch, cfg.num_layers))} of {cfg.num_layers} in {arch} models; export --format hf"
        )
    slots = Layout(cfg).in_order()
    writer = gguf.GGUFWriter(None, arch)
    kinds = {s.hf: type_of(tensors[s.hf], dtype) for s in slots}
    _model_keys(writer, cfg, arch, name, list(kinds.values()))
    for key, value in (vocabulary or {"tokenizer.ggml.model": "none"}).items():
        _put_key(writer, key, value)
    types = gguf.GGMLQuantizationType
    divisors = frequency_divisors(cfg)
    if divisors is not None:
        writer.add_tensor_info(ROPE_FREQS, divisors.shape, divisors.dtype, divisors.nbytes, types.F32)
    for s in slots:
        block, size = gguf.GGML_QUANT_SIZES[types[kinds[s.hf]]]
        writer.add_tensor_info(
            tensor_name(s), s.shape, np.dtype(np.int8), s.size // block * size, types[kinds[s.hf]]
        )
    with atomic_write(path) as f:
        try:
            writer.write_header_to_file(Path(f.name))
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if divisors is not None:
                _put_tensor(writer, divisors)
            for s in slots:
                x, heads = tensors[s.hf], turned_heads(cfg, s)
                x = convert(f"{path}: {s.hf}", to_adjacent(x, heads) if heads else x, kinds[s.hf])
                _put_tensor(writer, x.view(np.uint16) if x.dtype == BF16 else x)
        finally:
            writer.close()
    return {kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()))}


def _check_lengths(cfg: ModelConfig, path: str | Path) -> None:
    """Raise Refused for a number of positions that is more than the uint32 of its key holds."""
    for of, key in (cfg, "max_position_embeddings"), (cfg.rope_scaling, "original_max_position_embeddings"):
        if (positions := getattr(of, key, 0)) >= 1 << 32:
            raise Refused(
                f"{path}: {key} = {positions}: a GGUF file holds less than {1 << 32}; export --format hf"
            )


def _check_shapes(cfg: ModelConfig, arch: str, path: str | Path) -> None:
    """Raise Refused for a model whose file llama.cpp would not open: its loader asks for other tensors, or other shapes."""
    wide = cfg.num_heads * cfg.head_dim
    if arch in HEADS_FILL_HIDDEN and wide != cfg.hidden_size:
        raise Refused(
            f"{path}: num_heads * head_dim = {wide}, hidden_size = {cfg.hidden_size}; llama.cpp opens "
            f"no {arch} model where the two differ: export --format hf"
        )
    if arch in HEAD_ALONE and cfg.tie_word_embeddings:
        raise Refused(
            f"{path}: tie_word_embeddings = true; llama.cpp opens no {arch} model without a head of its own: export --format hf"
        )


def _put_tensor(writer: Any, x: np.ndarray) -> None:
    """Write a tensor as the writer does, but for NumPy's tofile: it does not tell when the last bytes find no room.

    Raises OSError."""
    (f,) = writer.fout
    writer.write_padding(f, f.tell())
    f.write(np.ascontiguousarray(x).data)
    writer.write_padding(f, x.nbytes)


def _model_keys(writer: Any, cfg: ModelConfig, arch: str, name: str, kinds: list[str]) -> None:
    """Write the keys that llama.cpp's loader reads of a model: sizes, rotary embedding, epsilon."""
    positions = cfg.max_position_embeddings
    if cfg.sliding_window:
        positions = min(positions, cfg.sliding_window)
    is_plain = not any(part in name.lower() for part in NAMES_THAT_CHANGE_TOKENS)
    writer.add_name(name if name and is_plain else cfg.family)
    matrices = [k for k in kinds if k != "F32"] or ["F32"]
    writer.add_file_type(FILE_TYPE[max(set(matrices), key=matrices.count)])
    writer.add_quantization_version(2)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(positions)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    if cfg.family != arch:
        writer.add_string("apr.family", cfg.family)
    if cfg.sliding_window:
        writer.add_uint32("apr.sliding_window", cfg.sliding_window)
        writer.add_uint32("apr.max_position_embeddings", cfg.max_position_embeddings)
        by_layer = FAMILIES[cfg.family].write(cfg)
        for key in WINDOW_KEYS & by_layer.keys() - {"sliding_window"}:
            _put_key(writer, f"apr.{key}", by_layer[key])
    if cfg.rope_scaling:
        for key, value in dataclasses.asdict(cfg.rope_scaling).items():
            if value is not None and not isinstance(value, bool):
                writer.add_float64(f"apr.rope_scaling.{key}", float(value))
        if not isinstance(cfg.rope_scaling, Llama3Scaling):
            writer.add_string("apr.rope_scaling.rope_type", cfg.rope_scaling.rope_type)
    for key, value in scaling_keys(cfg).items():
        put = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
        put(f"{arch}.{key}", value)


def _no_rope_layers(arch: str, layers: int) -> tuple[int, ...]:
    """Numbers of the layers that llama.cpp gives no rotary embedding."""
    step = NO_ROPE_STEP.get(arch)
    return tuple(range(step - 1, layers, step)) if step else ()


def _put_key(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
