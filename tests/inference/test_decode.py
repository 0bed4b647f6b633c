"""Generation by decode steps that a device records: the kernels on the host (tests/support/host_shim.py), with the text of the
path that computes op by op, greedy and drawn, alone and together, for every family; on a GPU the recorded steps themselves."""

from __future__ import annotations

import ctypes
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.backends import reference
from apr.backends.cuda import decode, kernels, ops
from apr.common.errors import Refused
from apr.inference import int8
from apr.inference.generate import Generator, generator_memory
from apr.inference.sampling import Continuation, Sampling, pick
from apr.model.block import Block
from apr.model.lora import LINEAR, LoraConfig
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from cases import overlay
from host_shim import Host, folder  # noqa: F401  folder is a fixture

FAMILIES = [name for name in PRESETS if name.endswith("-tiny")]
PROMPTS = [[5, 9, 2], list(range(30)), [7] * 11]
ENDS = {17, 50}
# Greedy, drawn with each limit, and one that ends early.
SAMPLING = [
    Sampling(5, 0.0),
    Sampling(3, 1.2, seed=4, top_k=9, min_p=0.02, repetition_penalty=1.2),
    Sampling(2, 0.9, seed=3, top_p=0.9),
]
VARIANTS: dict[str, dict[str, int]] = {
    "decode_linear": {"TOKEN_TILES": 0},
    "decode_attention": {"HEADS": 4, "LANES": 16},
    "decode_pick": {},
}


@pytest.fixture(scope="module")
def host(folder: Path) -> Host:
    """The modules of decoding, compiled for the host."""
    made = Host(folder)
    made.shared_bytes = 1 << 17
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(made.library, m, "float32", **d) for m, d in VARIANTS.items()]:
            job.result()
    return made


@pytest.fixture
def shim(host: Host, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backend whose decode steps are the kernels on the host, and whose other ops are the reference's."""
    monkeypatch.setattr(ops, "machine", host)
    monkeypatch.setattr(ops, "embedding_fwd", reference.embedding_fwd)
    return overlay(reference, decoder=lambda: decode, pad_vocab=True)


def weights(cfg: Any, seed: int = 7) -> np.ndarray:
    """Parameters that are all different from 0 and 1."""
    w = np.zeros(Layout(cfg).size, np.float32)
    Layout(cfg).randomise(w, seed, 0.2)
    return w


def texts(
    be: Any,
    cfg: Any,
    w: Any,
    recorded: bool,
    which: tuple[int, ...] = (0, 1, 2),
    dtype: str = "float32",
    **options: Any,
) -> dict[int, Any]:
    """New ids of some PROMPTS computed together, and why each ended."""
    generator = Generator(cfg, be, w, 64, dtype, rows=len(which), recorded=recorded, **options)
    seen: dict[int, Any] = {}
    for c, _ in generator.run([PROMPTS[i] for i in which], [SAMPLING[i] for i in which], ENDS):
        seen[which[c.number]] = c.new, c.ended
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_that_of_the_path_op_by_op(name: str, shim: Any) -> None:
    """Sequences of other lengths that end at other times; of three, one moves to the row of another."""
    cfg = PRESETS[name]
    w, among = weights(cfg), np.arange(0, cfg.vocab_size, 2)
    which = (0, 1, 2) if name == "mistral-tiny" else (1, 2)
    assert texts(shim, cfg, w, True, which, among=among) == texts(shim, cfg, w, False, which, among=among)


def test_what_a_sequence_gets_does_not_depend_on_the_others(shim: Any) -> None:
    cfg = PRESETS["mistral-tiny"]
    w = weights(cfg)
    assert texts(shim, cfg, w, True, (1, 2)) == {i: texts(shim, cfg, w, True, (i,))[i] for i in (1, 2)}


def test_readers_end_sequences_and_conversations_use_the_cache_again(shim: Any) -> None:
    """A stop string ends a sequence from outside; the next prompt begins with what the cache holds."""
    cfg = PRESETS["qwen3-tiny"]
    w = weights(cfg)

    def answers(recorded: bool) -> list[list[int]]:
        generator = Generator(cfg, shim, w, 64, recorded=recorded)
        first: list[int] = []
        for c, token in generator.run([[5, 9, 2]], Sampling(9, 0.0), reuse=True):
            first.append(token)
            c.ended = "stop" if len(first) == 3 else ""
        longer = [5, 9, 2, *first, 40]
        return [first, [t for _, t in generator.run([longer], Sampling(4, 0.0), reuse=True)]]

    assert answers(True) == answers(False)
    assert [len(a) for a in answers(True)] == [3, 4]


def test_a_step_that_cannot_be_recorded_runs_op_by_op_and_says_so(shim: Any, capsys: Any) -> None:
    cfg, calls = PRESETS["llama-tiny"], []
    w = weights(cfg)
    want = texts(shim, cfg, w, False, (0,))

    def capture(f: Any) -> Any:
        calls.append(f)
        raise RuntimeError("no graph today")

    assert texts(overlay(shim, capture=capture), cfg, w, True, (0,)) == want
    assert len(calls) == 1
    assert "its step cannot be recorded: no graph today" in capsys.readouterr().err
    wide = dataclasses.replace(cfg, hidden_size=44)
    Generator(wide, shim, weights(wide), 64)
    assert "runs op by op: rows of 44 elements are no multiple of 8" in capsys.readouterr().err
    Generator(wide, shim, weights(wide), 64)
    assert capsys.readouterr().err == ""  # said once
    assert Generator(cfg, reference, w, 64)._decoding is None
    assert capsys.readouterr().err == ""


def test_a_capture_that_does_nothing_is_seen(shim: Any) -> None:
    """The fault that the comparison of texts is for: a recorded step that does not run."""
    cfg = PRESETS["llama-tiny"]
    w, deaf = weights(cfg), overlay(shim, capture=lambda f: lambda: None)
    assert texts(deaf, cfg, w, True, (0,)) != texts(shim, cfg, w, False, (0,))


def test_damaged_weights_are_refused_and_every_byte_is_planned(shim: Any) -> None:
    cfg = PRESETS["qwen2-tiny"]
    w = weights(cfg)
    before = shim.memory()
    generator = Generator(cfg, shim, w, 20, rows=2)
    assert shim.memory() - before == generator_memory(cfg, shim, "float32", 2, 20).total - w.nbytes
    run = generator.run([[1, 2]], Sampling(5, 0.0))
    next(run)
    Layout(cfg).views(w).layer[0].wdown[...] = np.nan
    with pytest.raises(Refused, match="not finite"):
        list(run)


ADAPTERS = {
    "two maps": LoraConfig(2, 8.0, ("wq", "wdown")),
    "all maps, head, whole norms": LoraConfig(2, 8.0, (*LINEAR, "head"), saved=("norm",)),
    "tied": LoraConfig(2, 8.0, ("wv", "wup", "embed", "head")),
    "dora": LoraConfig(2, 8.0, ("wk", "wo", "wgate"), dora=True),
    "int8": LoraConfig(2, 8.0, ("wo", "wup"), base="int8"),
    "dropout": LoraConfig(2, 8.0, ("wq", "wdown"), dropout=0.5),
}


def with_adapters(be: Any, cfg: Any, lora: LoraConfig, dtype: str = "float32") -> Any:
    """Adapters in training, of a model with parameters and adapters that are all different from 0."""
    model = Model(cfg, be, 1, 8, dtype, lora=lora)
    adapters: Any = model.adapters
    read = model.layout.named(weights(cfg)).__getitem__
    adapters.set_base(read)
    host = np.zeros(adapters.layout.size, np.float32)
    adapters.layout.init(host, 0, read)
    host += 0.3 * np.random.default_rng(0).standard_normal(host.shape).astype(np.float32)
    be.from_host(adapters.w, host)
    return adapters


def spoken(generator: Generator) -> dict[int, list[int]]:
    """New ids of a greedy and a drawn sequence, three of each."""
    options = [Sampling(3, 0.0), Sampling(3, 0.9, seed=3, top_p=0.9)]
    run = generator.run([PROMPTS[0], PROMPTS[2]], options)
    return {c.number: c.new for c in [c for c, _ in run]}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_text_under_adapters_is_that_of_the_path_op_by_op(kind: str, shim: Any) -> None:
    """Matrices are made in the step: what a training step changes between two generations is seen by the second."""
    cfg = PRESETS["qwen2-tiny" if kind == "tied" else "llama-tiny"]
    adapters = with_adapters(shim, cfg, ADAPTERS[kind])
    recorded, plain = (Generator(cfg, shim, adapters, 32, rows=2, recorded=r) for r in (True, False))
    assert recorded._decoding is not None
    before = spoken(recorded)
    assert before == spoken(plain)
    if kind == "two maps":
        assert before != spoken(Generator(cfg, shim, weights(cfg), 32, rows=2, recorded=False))
        adapters.w *= 3
        assert spoken(recorded) == spoken(plain) != before


def early_reads(be: Any, host: Host, adapters: Any, monkeypatch: Any) -> list[bool]:
    """Tell of each linear map whose matrix was made in the step whether its kernel was launched early."""
    made, load, out = adapters._effective, Host.kernel, []

    def kernel(self: Host, module: str, name: str, act: str, **defines: int) -> Any:
        launch = load(self, module, name, act, **defines)

        def noted(grid: Any, block: Any, args: tuple[Any, ...], **options: Any) -> None:
            if module == "decode_linear" and any(
                np.may_share_memory(x, made) for x in args if hasattr(x, "shape")
            ):
                out.append(bool(options.get("early")))
            launch(grid, block, args, **options)

        return noted

    with monkeypatch.context() as m:
        m.setattr(Host, "kernel", kernel)
        list(Generator(PRESETS["llama-tiny"], be, adapters, 8).run([[5, 9, 2]], Sampling(2, 0.0)))
    return out


def test_no_kernel_asks_early_for_a_matrix_that_is_being_made(
    shim: Any, host: Host, monkeypatch: Any
) -> None:
    adapters = with_adapters(shim, PRESETS["llama-tiny"], LoraConfig(2, 8.0, ("wq", "wup", "wdown", "head")))
    launches = early_reads(shim, host, adapters, monkeypatch)
    assert launches
    assert not any(launches)
    monkeypatch.setattr(Block, "is_made", lambda self, name: False)
    assert any(early_reads(shim, host, adapters, monkeypatch))


def test_draws_end_with_the_positions() -> None:
    """However many tokens are asked for, no more numbers are drawn than the model has positions."""
    draws = Continuation(0, [5, 9, 2], Sampling(10**15, 0.9, seed=3)).row(6).draws
    assert draws.tolist() == np.random.default_rng(3).random(2).tolist()


def test_rows_that_kernels_of_8_bits_cannot_read_are_refused(shim: Any) -> None:
    cfg = dataclasses.replace(PRESETS["llama-tiny"], intermediate_size=172)
    with pytest.raises(Refused, match="rows of 172 elements are no multiple of 8; use another --dtype"):
        int8.Int8Weights(cfg, weights(cfg), shim)
    assert int8.Int8Weights(cfg, weights(cfg), reference).nbytes


PICKS: list[tuple[float, dict[str, Any]]] = [
    (0.0, {"temperature": 0.9, "top_k": 2500}),  # more equal logits than a list holds
    (0.5, {"temperature": 0.7}),
    (3.0, {"temperature": 0.9, "top_p": 0.9, "min_p": 1e-3, "top_k": 300}),
    (3.0, {"temperature": 0.0}),
]


@pytest.mark.parametrize(("scale", "options"), PICKS)
def test_the_draw_of_the_device_is_that_of_the_host(shim: Any, scale: float, options: dict[str, Any]) -> None:
    n, vocab = 3, 3000
    options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    logits = (scale * np.random.default_rng(1).standard_normal((n, vocab))).astype(np.float32).round(2)
    allowed = np.arange(vocab) % 7 != 3
    draws = np.stack([np.random.default_rng(seed).random(1) for seed in range(n)])
    tokens, positions, steps = (np.zeros(n, np.int32) for _ in range(3))
    made = decode.work_arrays(n, 1, 1, 1, 4)
    work = tuple(np.zeros(*made[name]) for name in ("bins", "sums", "tops"))
    row = options["temperature"], options["top_p"], options["min_p"], 1.0
    chosen, seen = np.zeros(n), np.zeros((n, vocab), np.uint8)
    top_k = np.full(n, options["top_k"], np.int32)
    numbers = draws, np.tile(np.array(row), (n, 1)), top_k
    decode.pick(
        tokens, positions, steps, chosen, seen, work, logits, vocab, allowed.astype(np.uint8), *numbers
    )
    ids = np.flatnonzero(allowed)
    want = [int(ids[pick(x[ids], np.random.default_rng(seed), **options)]) for seed, x in enumerate(logits)]
    assert (chosen.tolist(), tokens.tolist()) == (want, want)
    assert not work[0].any()
    assert not work[1].any()


def test_ids_of_any_vocabulary_are_drawn(shim: Any, folder: Path, monkeypatch: Any) -> None:
    """Equal logits, more of them than a list holds: the id alone decides, to its last bit; and ids of too few bits."""
    vocab, draw = (1 << 21) + 3, 0.999999
    allowed, seen = np.zeros(vocab, np.uint8), np.zeros((1, vocab), np.uint8)
    allowed[-2100:] = 1
    logits = np.zeros((1, vocab), np.float32)

    def drawn() -> float:
        made = decode.work_arrays(1, 1, 1, 1, 4)
        work = tuple(np.zeros(*made[name]) for name in ("bins", "sums", "tops"))
        state, chosen = [np.zeros(1, np.int32) for _ in range(3)], np.zeros(1)
        numbers = np.full((1, 1), draw), np.array([[1.0, 1.0, 0.0, 1.0]]), np.zeros(1, np.int32)
        decode.pick(*state, chosen, seen, work, logits, vocab, allowed, *numbers)
        return float(chosen[0])

    assert drawn() == vocab - 2100 + int(2100 * draw)
    text, right = kernels.source("decode_pick"), "KEY_BITS - __clz(V)"
    assert right in text
    monkeypatch.setattr(ops, "machine", Host(folder, {"decode_pick": text.replace(right, "21")}))
    assert drawn() != vocab - 2100 + int(2100 * draw)


def test_kernels_wait_for_those_ahead(host: Host, folder: Path, shim: Any, monkeypatch: Any) -> None:
    """An input that is there only after the wait (decode_shim.h), and a kernel that reads it before."""
    rng = np.random.default_rng(0)
    x, w, norm, old = (rng.standard_normal(s).astype(np.float32) for s in ((2, 64), (8, 64), 64, (2, 8)))
    want = old + (x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * norm) @ w.T

    def got(late: str) -> np.ndarray:
        y, args = old.copy(), {"x": x.copy()}
        at = {"x": args["x"], "y": y}[late]
        is_there, library = at.copy(), ops.machine.library("decode_linear", "float32", TOKEN_TILES=0)
        arrive = library._loaded.shim_late
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (at, is_there)]
        arrive(*pointers, ctypes.c_size_t(at.nbytes))
        decode.linear(y, args["x"], w, norm=norm, eps=1e-5, adds=True)
        arrive(None, None, ctypes.c_size_t(0))
        return y

    for late in ("x", "y"):
        np.testing.assert_allclose(got(late), want, 1e-4, 1e-4)
    text, call = kernels.source("decode_linear"), "  wait_for_before();\n"
    for late, before in (("y", "  const int x_row = "), ("x", "  if (first < O) {\n")):
        begin, end = text.rsplit(call, 2)[0], text[text.index(before) :]
        middle = text[len(begin) + len(call) : len(text) - len(end)]
        spoiled = Host(folder, {"decode_linear": begin + middle + call + end})
        spoiled.shared_bytes = host.shared_bytes
        monkeypatch.setattr(ops, "machine", spoiled)
        assert np.isnan(got(late)).any(), late


def test_products_on_tensor_cores(host: Host, shim: Any) -> None:
    """Tiles of tokens, two, one and a half; inputs that fill no step, and many; biases, gates, norms, sums; 8-bit weights."""
    rng = np.random.default_rng(0)
    bf16 = np.dtype("bfloat16")

    def made(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(bf16)

    long = decode.LONG * 32
    for n, o, k, gated in ((3, 24, 72, False), (19, 20, 136, True), (1, 16, long, False), (9, 8, 200, True)):
        x, b, norm, old = made(n, k), made(o), made(k), made(n, o)
        wide = made((1 + gated) * o, k)
        q = int8.Int8Matrix.of(wide.astype(np.float32))
        normed = np.zeros((n, k), bf16)
        decode.rms_norm(normed, x, norm, 1e-5)
        f = x.astype(np.float32)
        want = f / np.sqrt((f * f).mean(-1, keepdims=True) + 1e-5) * norm.astype(np.float32)
        assert np.abs(normed.astype(np.float32) - want).max() <= 2.0**-8 * np.abs(want).max()
        for w, values in ((wide, wide.astype(np.float32)), (q, q.to_float())):
            y = old.copy()
            decode.linear(y, x, w, None if gated else b, norm=norm, eps=1e-5, adds=not gated, gated=gated)
            z = normed.astype(np.float32) @ values.T
            if gated:
                gate, up = np.split(z, 2, -1)
                z = gate / (1 + np.exp(-gate)) * up
            else:
                z = z + b.astype(np.float32) + old.astype(np.float32)
            assert np.abs(y.astype(np.float32) - z).max() <= 0.02 * np.abs(z).max(), (n, type(w))


# Faults: (module, right, wrong, window), each with a text that shows it.
FAULTS = [
    ("decode_attention", "max(0, pos - window + 1)", "max(0, pos - window)", 3),
    (
        "decode_attention",
        "const float factor = exp_(all[i * next + statistics] - most);",
        "const float factor = 1;",
        260,
    ),
    ("decode_pick", "positions[n] = min(positions[n] + 1, slots - 1)", "positions[n] = positions[n]", 260),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f[2][:20])
def test_a_planted_fault_changes_the_text(
    fault: Any, folder: Path, host: Host, shim: Any, monkeypatch: Any
) -> None:
    module, right, wrong, window = fault
    assert right in kernels.source(module)
    spoiled = Host(folder, {module: kernels.source(module).replace(right, wrong)})
    spoiled.shared_bytes = host.shared_bytes
    spoiled._libraries = {k: x for k, x in host._libraries.items() if k[0] != module}
    cfg = dataclasses.replace(PRESETS["mistral-tiny"], max_position_embeddings=300, sliding_window=window)
    w, prompt = weights(cfg), [i * 7 % 123 for i in range(254)]

    def text(recorded: bool) -> list[int]:
        run = Generator(cfg, shim, w, 260, recorded=recorded).run([prompt], Sampling(4, 0.0))
        return [token for _, token in run]

    want = text(False)
    assert text(True) == want
    monkeypatch.setattr(ops, "machine", spoiled)
    assert text(True) != want


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_text_on_a_gpu(name: str) -> None:
    """In float32 that of the path op by op; in bfloat16 and int8 the recorded step has the bits of the one that is not, alone
    and together."""
    be, cfg = backends.get("cuda"), PRESETS[name]
    host = weights(cfg)

    def on(dtype: str) -> Any:
        placed = be.empty(host.size, dtype)
        be.from_host(placed, host)
        return placed

    wide = on("float32")
    assert texts(be, cfg, wide, True) == texts(be, cfg, wide, False)
    unrecorded = overlay(be, capture=lambda f: f)
    rounded = int8.Int8Weights(cfg, host, be)
    for of, w in ((lambda x: x, on("bfloat16")), (int8.backend, rounded)):
        got = texts(of(be), cfg, w, True, dtype="bfloat16")
        assert got == texts(of(unrecorded), cfg, w, True, dtype="bfloat16")
        for i in range(3):
            assert texts(of(be), cfg, w, True, (i,), "bfloat16") == {i: got[i]}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ADAPTERS)
def test_recorded_text_under_adapters_on_a_gpu(kind: str) -> None:
    """In float32 that of the path op by op; in bfloat16 the recorded step has the bits of the one that is not."""
    be, cfg = backends.get("cuda"), PRESETS["qwen2-tiny" if kind == "tied" else "llama-tiny"]
    wide = with_adapters(be, cfg, ADAPTERS[kind])
    assert texts(be, cfg, wide, True) == texts(be, cfg, wide, False)
    adapters = with_adapters(be, cfg, ADAPTERS[kind], "bfloat16")
    unrecorded = overlay(be, capture=lambda f: f)
    assert texts(be, cfg, adapters, True, dtype="bfloat16") == texts(
        unrecorded, cfg, adapters, True, dtype="bfloat16"
    )
