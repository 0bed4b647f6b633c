"""The step of generation on a device that runs ahead: each sequence's next token from its last one, without the host.

Sequence n is row n of the KV cache, its token t in slot t. Tokens, positions and draws lie on the device, so that a step is the
same launches every time: it is recorded once for each number of sequences, and launched again. With adapters, the matrix of a
linear map is made in the step, before the map: a training step between two generations is seen, and nothing else is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..common.printable import printable
from .config import ModelConfig
from .taps import no_tap
from .transformer import Model


def lacks(c: ModelConfig, backend: Any, dtype: str) -> str | None:
    """Name what keeps a model from being decoded by recorded steps; "" for nothing, None on backends that have none."""
    ops = backend.decoder()
    inner = c.num_heads * c.head_dim
    return None if ops is None else ops.lacks(c.head_dim, dtype, c.hidden_size, inner, c.intermediate_size)


@cache
def say_once(line: str) -> None:
    """Tell people on the standard error stream, once in a process: tasks make a generator for each of thousands of texts."""
    print(printable(line), file=sys.stderr)


@dataclass(frozen=True)
class Row:
    """A sequence whose prompt is in the cache: ids so far, the last of which is to be read; options of its draws.

    options: temperature, top_p, min_p, repetition penalty. draws: numbers in [0,1) for the tokens to come."""

    ids: Sequence[int]
    options: tuple[float, float, float, float]
    top_k: int
    draws: np.ndarray


class Decoding:
    """Recorded steps of a model that was made with a cache. allowed: ids that may be drawn, or None for all.

    recorded: False after a step could not be recorded, or where it is not to be; then it runs op by op, by the same kernels."""

    def __init__(self, model: Model, allowed: np.ndarray | None, recorded: bool = True) -> None:
        self.model, self.recorded = model, recorded
        be, b, c = model.be, model.buffers, model.cfg
        self._ops, self._allowed = be.decoder(), None
        if allowed is not None:
            self._allowed = b["step_allowed"]
            mask = np.zeros(c.vocab_size, np.uint8)
            mask[allowed] = 1
            be.from_host(self._allowed, mask)
        self._warm: set[int] = set()
        self._graphs: dict[int, Callable[[], None]] = {}

    def begin(self, rows: Sequence[Row]) -> None:
        """Begin with these sequences, in the order of the rows of the cache."""
        be, b, n = self.model.be, self.model.buffers, len(rows)
        slots = b["step_draws"].shape[1]
        if self.model.adapters:
            self.model.adapters.begin_forward()
        put: dict[str, np.ndarray] = {
            "tokens": np.array([r.ids[-1] for r in rows], np.int32),
            "positions": np.array([len(r.ids) - 1 for r in rows], np.int32),
            "counts": np.zeros(n, np.int32),
            "options": np.array([r.options for r in rows], np.float64),
            "top_k": np.array([min(r.top_k, self.model.cfg.vocab_size) for r in rows], np.int32),
        }
        draws = put["draws"] = np.zeros((n, slots), np.float64)
        for i, r in enumerate(rows):
            draws[i, : len(r.draws[:slots])] = r.draws[:slots]
            if r.options[3] != 1:
                seen = np.zeros(self.model.cfg.vocab_size, np.uint8)
                seen[np.asarray(r.ids)] = 1
                be.from_host(b["step_seen"][i], seen)
        for name, values in put.items():
            be.from_host(b["step_" + name][:n], values)

    def step(self, n: int) -> Callable[[], list[int]]:
        """Ask for the next token of the first n sequences; the result waits for them: -1 where logits are not finite."""
        rows = min(self.model.batch, 1 << (n - 1).bit_length())
        if rows in self._graphs:
            self._graphs[rows]()
        elif self.recorded and rows in self._warm:
            self._record(rows)
        else:
            self._warm.add(rows)
            self._launch(rows)
        read = self.model.be.read_later((self.model.buffers["step_chosen"][:n],))
        return lambda: [int(x) for x in read()]

    def _record(self, rows: int) -> None:
        """Record a step and run it; op by op from now on where that fails."""
        try:
            self._graphs[rows] = self.model.be.capture(lambda: self._launch(rows))
        except Exception as e:
            self.recorded = False
            say_once(f"generation runs op by op: its step cannot be recorded: {e}")
            self._launch(rows)
            return
        self._graphs[rows]()

    def move(self, to: int, source: int, slots: int) -> None:
        """Put a sequence, whose cache has `slots` slots, in the place of another."""
        be, b = self.model.be, self.model.buffers
        self.model.move_row(to, source, slots)
        for name in ("tokens", "positions", "counts", "options", "top_k", "draws", "seen"):
            rows = b["step_" + name]
            be.copy(rows[to : to + 1], rows[source : source + 1])

    def _launch(self, n: int) -> None:
        m, b, ops, eps = self.model, self.model.buffers, self._ops, self.model.cfg.rms_norm_eps
        m.b, m.t = n, 1
        blocks, s = m._at(n, 1)
        tokens, positions = b["step_tokens"][:n], b["step_positions"][:n]
        res = s.res
        ops.rows(res, tokens, m._outside("embed", m.p.embed))
        for i, (layer, a, w) in enumerate(zip(m.layers, blocks, m.p.layer, strict=True)):
            block = m._of(i, no_tap)
            norm = w.attn_norm if layer.attn_norm else None
            bias = w.bqkv if layer.qkv_bias else None
            ops.linear(a.qkv, res, block.matrix("wqkv"), bias, norm=norm, eps=eps, made=block.is_made("wqkv"))
            qk, norms = a.qkv, (None, None)
            if layer.qk_norm == "all":
                block.norm_heads()
                qk = a.qk
            elif layer.qk_norm:
                norms = w.q_norm, w.k_norm
            angles = (m.cos, m.sin) if layer.rope else (None, None)
            values = a.qkv[:, -m.cfg.num_kv_heads * m.cfg.head_dim :]
            ops.attention(
                a.att, *m._cache[i], qk, values, norms, angles, positions,
                b["step_part"], b["step_arrived"], m.cfg.num_heads, layer.window, eps,
            )  # fmt: skip
            self._branch(block, a.att_out, a.att, "wo", layer.attn_post_norm and w.attn_post_norm, 1)
            norm = w.mlp_norm if layer.mlp_norm else None
            ahead = None if block.is_made("wdown") else w.wdown
            ops.linear(
                a.act, res, block.matrix("wgu"), norm=norm, eps=eps, gated=True, ahead=ahead, made=block.is_made("wgu")
            )  # fmt: skip
            self._branch(block, a.mlp_out, a.act, "wdown", layer.mlp_post_norm and w.mlp_post_norm, 2)
        logits = m._logits[:n]
        ops.rms_norm(s.final_norm, res, m.p.final_norm, eps)
        head = m._outside("head", m._head)
        ops.linear(logits, s.final_norm, head, made=head is not m._head)
        state = tokens, positions, b["step_counts"][:n], b["step_chosen"][:n], b["step_seen"][:n]
        drawn = b["step_draws"][:n], b["step_options"][:n], b["step_top_k"][:n]
        work = b["step_bins"][:n], b["step_sums"][:n], b["step_tops"][:n]
        ops.pick(*state, work, logits, m.cfg.vocab_size, self._allowed, *drawn)

    def _branch(self, block: Any, out: Any, x: Any, name: str, post: Any, number: int) -> None:
        """res += x w^T, w by its name, with the norm behind a branch where there is one."""
        res, w, made = block.s.res, block.matrix(name), block.is_made(name)
        if post is False:
            self._ops.linear(res, x, w, adds=True, made=made)
            return
        self._ops.linear(out, x, w, made=made)
        block.post_norm(out, getattr(block.a, f"post_rstd{number}"), post)
        block.be.add(res, res, block.s.delta)
