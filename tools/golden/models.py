"""Golden files: what stock Hugging Face models compute, in float64, for tests to compare with.

    python -m venv torch-env && torch-env/bin/pip install torch transformers safetensors
    torch-env/bin/python tools/golden/models.py [--out tests/golden] [--check]

The only file of the project that imports torch and transformers, in an environment of its own (the
tests need neither). Of apr it imports the config alone: weights, loss, optimizer and checks are
torch, NumPy and this file, so that a fault of apr cannot reach the reference.

One file CASE.safetensors per row of CASES. Letters: B sequences of T tokens, vocabulary V, hidden
size C, L blocks; S = 10 optimizer steps. HF stands for every parameter name of the stock model; a tied
head is not a parameter, so lm_head.weight is absent from every group of a tied case.

    weight.HF               float32   value, shape as in a checkpoint: matrices (out, in)
    ids                     int32     (B,T) input tokens, no padding
    targets                 int32     (B,T) the token that follows each; -100 where the loss ignores it
    hidden.0                float64   (B,T,C) output of the embedding
    hidden.I                float64   (B,T,C) residual stream after block I, I = 1..L, before the final norm
    final_norm              float64   (B,T,C) input of the head
    logits                  float64   (B,T,V)
    loss                    float64   (1,) nats, mean over the targets that are not ignored
    grad.HF                 float64   d loss / d HF, shape of HF; not clipped; tied: through both uses
    adamw.ids               int32     (S,B,T) batches of another run, which starts from weight.* too
    adamw.targets           int32     (S,B,T) -100 ignored; how many are ignored differs between steps
    adamw.losses            float64   (S,) nats, loss of batch i before update i, i = 0..S-1
    adamw.grad_norms        float64   (S,) L2 norm of all gradients together, before clipping
    adamw.lrs               float64   (S,) peak_lr * min(1, (i + 1) / warmup_steps)
    adamw.final_norm2.HF    float64   (1,) sqrt(sum of squares) of HF after update S-1

Metadata: three JSON objects as strings. `config`: a config.json, as apr's from_hf and transformers
read it. `adamw`: max_norm, betas, eps, weight_decay, peak_lr, warmup_steps. `versions`: torch,
transformers, python.

Update i of adamw, t = i + 1 (Loshchilov & Hutter 2019, algorithm 2, as torch.optim.AdamW does it):
    g = grad * min(1, max_norm / (grad_norm + 1e-6))                        torch's clip_grad_norm_
    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  m, v start as 0
    p = p (1 - lr weight_decay) - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
with weight_decay for parameters of two dimensions (embedding included) and 0 for norms and biases.

--check computes everything again and compares with the files: weights, integers and metadata exactly
(versions may differ), floats to TOLERANCE times the largest magnitude of the tensor. Exit 1 when
anything differs.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from apr.model.config import ModelConfig
from apr.model.hf_config import from_hf, to_hf
from apr.model.presets import PRESETS

Tensors = dict[str, np.ndarray]

IGNORED = -100
MATRIX_STD, VECTOR_STD = 0.2, 0.3  # large enough that attention is far from uniform
STEPS = 10
TOLERANCE = {"adamw": 1e-9, "": 1e-12}  # by group; ten Adam steps amplify rounding


@dataclass(frozen=True)
class Case:
    """A model and its data: `seq` tokens in each of `batch` sequences; max_norm clips some steps."""

    config: ModelConfig
    seq: int
    max_norm: float
    batch: int = 3


def _llama3() -> ModelConfig:
    """The preset with wavelengths on both sides of both limits of the scaling, and between them."""
    base = PRESETS["llama3-tiny"]
    assert base.rope_scaling is not None
    scaling = replace(base.rope_scaling, original_max_position_embeddings=28)
    return replace(base, rope_theta=100.0, rope_scaling=scaling, tie_word_embeddings=False)


CASES = {
    "llama": Case(PRESETS["llama-tiny"], 37, 5.0),
    "llama3": Case(_llama3(), 39, 4.5),
    "mistral": Case(PRESETS["mistral-tiny"], 35, 6.0),
    "qwen2": Case(PRESETS["qwen2-tiny"], 33, 6.5),
    "qwen2-untied": Case(replace(PRESETS["qwen2-tiny"], num_layers=3, tie_word_embeddings=False), 35, 5.5),
    "qwen2-window": Case(
        replace(PRESETS["qwen2-tiny"], sliding_window=6, full_attention_layers=(0,)), 34, 6.5
    ),
    "qwen3": Case(PRESETS["qwen3-tiny"], 37, 3.5),
    "olmo2": Case(PRESETS["olmo2-tiny"], 36, 5.0),
    "smollm3": Case(PRESETS["smollm3-tiny"], 35, 6.0),
}
ADAMW: dict[str, Any] = dict(betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, peak_lr=1e-2, warmup_steps=4)


def demand(ok: bool, what: str) -> None:
    """Stop unless a fact that the files rely on holds."""
    if not ok:
        raise RuntimeError(f"golden/models.py: not true: {what}")


def close(got: torch.Tensor, want: torch.Tensor, tol: float, what: str) -> None:
    """Demand |got - want| <= tol * max |want| everywhere."""
    err = (got.detach() - want.detach()).abs().max() / want.detach().abs().max()
    demand(bool(err <= tol), f"{what}: relative difference {float(err):.2e} <= {tol:.0e}")


# --- random numbers -------------------------------------------------------------------------------


def stream(*name: str) -> np.random.Generator:
    """A random stream that depends on its name alone, not on the order of drawing."""
    return np.random.Generator(np.random.PCG64(list("/".join(name).encode())))


def draw_weight(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 weight: matrices normal(0, MATRIX_STD), biases normal(0, VECTOR_STD), norms around 1."""
    noise = stream(case, name).standard_normal(shape, dtype=np.float32)
    if len(shape) == 2:
        return noise * np.float32(MATRIX_STD)
    return noise * np.float32(VECTOR_STD) + np.float32(0 if name.endswith(".bias") else 1)


def draw_tokens(name: str, what: str, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """ids and targets (B,T) int32 of random texts; a few targets of "tokens", up to most of a step, are -100.

    The fewer targets count, the larger the gradient: so the norms of the steps spread.
    """
    rng = stream(name, what)
    text = rng.integers(0, case.config.vocab_size, (case.batch, case.seq + 1), dtype=np.int32)
    ids, targets = text[:, :-1].copy(), text[:, 1:].copy()
    gone = rng.choice(
        targets.size, int(rng.integers(3, 12 if what == "tokens" else targets.size - 9)), replace=False
    )
    targets.reshape(-1)[gone] = IGNORED
    return ids, targets


# --- the stock model ------------------------------------------------------------------------------


@contextmanager
def float32_is_float64() -> Iterator[None]:
    """Inside, `torch.float32` and `torch.float` name float64.

    RMSNorm, softmax and rotary embedding of transformers cast to torch.float32 by name; so they
    would round a float64 run. `check_precision` shows that nothing of float32 is left.
    """
    saved = torch.float32, torch.float
    torch.float32 = torch.float = torch.float64
    try:
        yield
    finally:
        torch.float32, torch.float = saved


def build(case: str, cfg: ModelConfig, dtype: torch.dtype, attention: str = "eager") -> Any:
    """The stock model with the case's weights. For float64, call it inside float32_is_float64."""
    hf = transformers.CONFIG_MAPPING[cfg.family].from_dict(to_hf(cfg))
    demand(from_hf(hf.to_dict()) == cfg, f"{case}: transformers reads the config as apr does")
    model = transformers.AutoModelForCausalLM.from_config(hf, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(draw_weight(case, name, tuple(p.shape))))
            demand(p.dtype == dtype, f"{case}: {name} is {dtype}")
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    demand(tied == cfg.tie_word_embeddings, f"{case}: tied head {tied}")
    return model.train()  # no dropout in these configs


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats, in the dtype of the logits (the loss of transformers casts)."""
    flat = logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(flat, targets.flatten().long(), ignore_index=IGNORED)


def watch(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Hook the model: forward then puts hidden.* and final_norm into the first dict, as stored.

    The second gets cos and sin of the rotary embedding. Hooks, because output_hidden_states of
    transformers gives the last residual stream after the norm instead of before it.
    """
    seen: dict[str, torch.Tensor] = {}
    rotary: dict[str, Any] = {}

    def keep(into: dict[str, Any], name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            into[name] = output

        return hook

    inner = model.model
    inner.embed_tokens.register_forward_hook(keep(seen, "hidden.0"))
    for i, block in enumerate(inner.layers, 1):
        block.register_forward_hook(keep(seen, f"hidden.{i}"))
    inner.norm.register_forward_hook(keep(seen, "final_norm"))
    inner.rotary_emb.register_forward_hook(keep(rotary, "cos_sin"))
    return seen, rotary


# --- what goes into a file ------------------------------------------------------------------------


def forward_backward(name: str, case: Case) -> tuple[Tensors, torch.Tensor]:
    """All but adamw.*, and the attention probabilities of every block (L,B,H,T,T)."""
    cfg = case.config
    ids, targets = draw_tokens(name, "tokens", case)
    with float32_is_float64():
        model = build(name, cfg, torch.float64)
        seen, rotary = watch(model)
        out = model(torch.from_numpy(ids).long(), use_cache=False, output_attentions=True)
        loss = loss_of(out.logits, torch.from_numpy(targets))
        loss.backward()
    check_precision(name, cfg, model, seen, rotary["cos_sin"])
    check_agreement(name, case, model, out.logits, loss)
    values = {**seen, "logits": out.logits, "loss": loss.reshape(1)}
    tensors: Tensors = {"ids": ids, "targets": targets}
    for key, p in model.named_parameters():
        tensors[f"weight.{key}"] = draw_weight(name, key, tuple(p.shape))
        values[f"grad.{key}"] = p.grad
    tensors |= {key: value.detach().numpy() for key, value in values.items()}
    return tensors, torch.stack(out.attentions).detach()


def train(name: str, case: Case) -> Tensors:
    """adamw.*: ten steps of the stock optimizer from the same weights."""
    data = [draw_tokens(name, f"step{i}", case) for i in range(STEPS)]
    with float32_is_float64():
        model = build(name, case.config, torch.float64)
    params = dict(model.named_parameters())
    groups = [
        dict(params=[p for p in params.values() if p.dim() == 2], weight_decay=ADAMW["weight_decay"]),
        dict(params=[p for p in params.values() if p.dim() == 1], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(ADAMW["betas"]), eps=ADAMW["eps"])
    rows = []
    for i, (ids, targets) in enumerate(data):
        lr = ADAMW["peak_lr"] * min(1.0, (i + 1) / ADAMW["warmup_steps"])
        with float32_is_float64():
            logits = model(torch.from_numpy(ids).long(), use_cache=False).logits
        loss = loss_of(logits, torch.from_numpy(targets))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params.values(), case.max_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        rows.append((loss.item(), norm.item(), lr))
    losses, norms, lrs = np.array(rows, np.float64).T.copy()
    return {
        "adamw.ids": np.stack([ids for ids, _ in data]),
        "adamw.targets": np.stack([targets for _, targets in data]),
        "adamw.losses": losses,
        "adamw.grad_norms": norms,
        "adamw.lrs": lrs,
        **{f"adamw.final_norm2.{k}": p.detach().norm().reshape(1).numpy() for k, p in params.items()},
    }


def make(name: str, case: Case) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a file, checked."""
    tensors, probs = forward_backward(name, case)
    check_attention(name, case.config, probs)
    check_switches(name, case, float(tensors["loss"][0]))
    tensors |= train(name, case)
    check_clipping(name, case, tensors)
    config = to_hf(case.config)
    demand(from_hf(json.loads(json.dumps(config))) == case.config, f"{name}: from_hf reads the config")
    versions = dict(
        torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version()
    )
    meta = dict(config=config, adamw=dict(max_norm=case.max_norm, **ADAMW), versions=versions)
    return tensors, {key: json.dumps(value) for key, value in meta.items()}


# --- facts the files rely on ----------------------------------------------------------------------


def inv_freq(cfg: ModelConfig) -> np.ndarray:
    """Rotary frequencies (D/2,) in float64, by hand: Su et al. 2021, scaling of Llama 3.1's model.py."""
    freqs = []
    for k in range(0, cfg.head_dim, 2):
        f, s = cfg.rope_theta ** (-k / cfg.head_dim), cfg.rope_scaling
        if s:
            turns = s.original_max_position_embeddings * f / (2 * math.pi)  # over the original length
            keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            keep = min(1.0, max(0.0, keep))
            f = keep * f + (1 - keep) * f / s.factor
        freqs.append(f)
    return np.array(freqs)


def check_precision(name: str, cfg: ModelConfig, model: Any, seen: dict[str, Any], cos_sin: Any) -> None:
    """Rotary embedding and norm are float64 to the last digits, not float32 widened at the end."""
    freq = torch.from_numpy(inv_freq(cfg))
    close(model.model.rotary_emb.inv_freq, freq, 1e-15, f"{name}: inv_freq")
    angle = torch.arange(seen["hidden.0"].shape[1])[:, None] * torch.cat((freq, freq))
    close(cos_sin[0][0], angle.cos(), 1e-13, f"{name}: cos")
    close(cos_sin[1][0], angle.sin(), 1e-13, f"{name}: sin")
    x = seen[f"hidden.{cfg.num_layers}"]
    norm = x / (x.square().mean(-1, keepdim=True) + cfg.rms_norm_eps).sqrt() * model.model.norm.weight
    close(seen["final_norm"], norm, 1e-14, f"{name}: final norm")


def check_agreement(name: str, case: Case, model: Any, logits: torch.Tensor, loss: torch.Tensor) -> None:
    """Attention "sdpa" agrees to float64 rounding, the untouched float32 model and its loss to float32's."""
    grads = {k: p.grad for k, p in model.named_parameters()}
    ids, targets = draw_tokens(name, "tokens", case)
    x, y = torch.from_numpy(ids).long(), torch.from_numpy(targets).long()
    with float32_is_float64():
        sdpa = build(name, case.config, torch.float64, "sdpa")
        sdpa_logits = sdpa(x, use_cache=False).logits
        loss_of(sdpa_logits, y).backward()
    stock = build(name, case.config, torch.float32)
    out = stock(x, labels=y, shift_labels=y, use_cache=False)
    out.loss.backward()
    demand(stock.model.rotary_emb.inv_freq.dtype == torch.float32, f"{name}: the float32 run is stock")
    close(sdpa_logits, logits, 1e-13, f"{name}: logits of sdpa")
    close(out.logits.double(), logits, 1e-5, f"{name}: logits in float32")
    close(out.loss.double(), loss, 1e-5, f"{name}: loss in float32")
    for key, p in sdpa.named_parameters():
        close(p.grad, grads[key], 1e-12, f"{name}: gradient of {key} by sdpa")
        close(
            stock.get_parameter(key).grad.double(), grads[key], 1e-4, f"{name}: gradient of {key} in float32"
        )


def check_attention(name: str, cfg: ModelConfig, probs: torch.Tensor) -> None:
    """Query i sees key j exactly when 0 <= i - j < window of the layer, and its attention is far from uniform."""
    t, spread = probs.shape[-1], []
    ahead = torch.arange(t)[:, None] - torch.arange(t)
    for layer, p in enumerate(probs):
        window = 0 if layer in cfg.full_attention_layers else cfg.sliding_window
        allowed = (ahead >= 0) & (ahead < (window or t))
        demand(bool(((p > 0) == allowed).all()), f"{name}: the keys a query of layer {layer} sees")
        entropy = torch.special.entr(p).sum(-1)
        spread.append((entropy.exp() / allowed.sum(-1))[..., 1:])
    # 1: uniform
    share = float(torch.stack(spread).mean())
    demand(share < 0.75, f"{name}: attention is far from uniform: spread {share:.2f}")


def check_switches(name: str, case: Case, loss: float) -> None:
    """Scaling, windows and layers without rotary embedding are active: the loss moves with each of them changed."""
    cfg = case.config
    others = [replace(cfg, rope_scaling=None)] if cfg.rope_scaling else []
    if cfg.sliding_window:
        others += [replace(cfg, sliding_window=cfg.sliding_window + d) for d in (-1, 1)]
    if cfg.full_attention_layers:
        others.append(replace(cfg, full_attention_layers=()))
    if cfg.no_rope_layers:
        others += [replace(cfg, no_rope_layers=layers) for layers in ((), (cfg.num_layers - 1,))]
    if cfg.rope_scaling:
        plain = inv_freq(replace(cfg, rope_scaling=None))
        ratio = inv_freq(cfg) / plain * cfg.rope_scaling.factor
        demand(
            {1.0, cfg.rope_scaling.factor} < set(ratio.round(9)),
            f"{name}: some frequencies kept, some divided by factor, some between: {ratio}",
        )
    ids, targets = draw_tokens(name, "tokens", case)
    for other in others:
        with float32_is_float64(), torch.no_grad():
            logits = build(name, other, torch.float64)(torch.from_numpy(ids).long(), use_cache=False).logits
        moved = abs(float(loss_of(logits, torch.from_numpy(targets))) - loss)
        demand(moved > 1e-3, f"{name}: the loss moves by {moved:.1e} with {other}")


def check_clipping(name: str, case: Case, tensors: Tensors) -> None:
    """Some steps are clipped, some are not, none is on the edge, and without clipping the losses differ."""
    ratio = tensors["adamw.grad_norms"] / case.max_norm
    demand(2 <= (ratio > 1).sum() <= STEPS - 2, f"{name}: clipping bites on some steps only: {ratio}")
    demand(bool((abs(ratio - 1) > 1e-2).all()), f"{name}: no step is on the edge of clipping: {ratio}")
    free = train(name, replace(case, max_norm=math.inf))["adamw.losses"]
    moved = float(abs(free - tensors["adamw.losses"]).max())
    demand(moved > 1e-3, f"{name}: losses move by {moved:.1e} without clipping")


# --- files ----------------------------------------------------------------------------------------


def to_bytes(tensors: Tensors, meta: dict[str, str]) -> bytes:
    """A safetensors file with its metadata in the order of `meta`: save() shuffles it."""
    data = save(tensors, meta)
    end = 8 + int.from_bytes(data[:8], "little")
    header = {**json.loads(data[8:end]), "__metadata__": meta}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def differences(path: Path, tensors: Tensors, meta: dict[str, str]) -> list[str]:
    """One line for each way in which a file is not what was computed now."""
    try:
        with safe_open(path, "numpy") as f:
            old, old_meta = {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        return [f"{path}: {e}"]
    lines = [f"{path}: metadata {k!r} differs" for k in ("config", "adamw") if old_meta.get(k) != meta[k]]
    lines += [f"{path}: {key!r} is in one of them only" for key in sorted(old.keys() ^ tensors.keys())]
    for key in sorted(old.keys() & tensors.keys()):
        a, b = old[key], tensors[key]
        if a.dtype != b.dtype or a.shape != b.shape:
            lines.append(f"{path}: {key!r} was {a.dtype} {a.shape}, is {b.dtype} {b.shape}")
        elif b.dtype != np.float64:
            if not np.array_equal(a, b):
                lines.append(f"{path}: {key!r} is not equal")
        else:
            err, tol = abs(a - b).max(), TOLERANCE["adamw" if key.startswith("adamw.") else ""] * abs(b).max()
            if not err <= tol:
                lines.append(f"{path}: {key!r} differs by {err:.1e}, allowed {tol:.1e}")
    return lines


def main() -> int:
    """Write the files, or compare with them. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Golden files from stock Hugging Face models")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden", help="folder of the files")
    parser.add_argument("--check", action="store_true", help="compare with the files; write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order on every machine
    transformers.logging.set_verbosity_error()
    wrong = []
    for name, case in CASES.items():
        tensors, meta = make(name, case)
        path = args.out / f"{name}.safetensors"
        if args.check:
            wrong += differences(path, tensors, meta)
        else:
            try:
                args.out.mkdir(parents=True, exist_ok=True)
                path.write_bytes(to_bytes(tensors, meta))
            except OSError as e:
                sys.exit(f"golden/models.py: cannot write {path}: {e.strerror}")
        clipped = np.flatnonzero(tensors["adamw.grad_norms"] > case.max_norm).tolist()
        print(
            f"{name:13} loss {tensors['loss'][0]:.6f}  tensors {len(tensors)}  "
            f"bytes {path.stat().st_size if path.exists() else 0}  clipped at steps {clipped}"
        )
    if args.check:
        known = {f"{name}.safetensors" for name in CASES}
        wrong += [f"{p}: no such case" for p in sorted(args.out.glob("*.safetensors")) if p.name not in known]
        print("\n".join(wrong) or f"{args.out}: all as computed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
