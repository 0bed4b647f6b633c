"""The demo's dtype: bfloat16 where the processor multiplies it, float32 elsewhere, and a line that says which and why."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from apr import backends
from apr.backends.cpu import tiles
from apr.training import demo, inputs, summary
from apr.training.demo import choose_dtype, is_demo
from apr.training.demo_job import DEMO
from apr.training.settings import Settings, from_command_line, resolve

CPU = backends.get("cpu")
DEMO_JOB = from_command_line([])[0]
SMALL = dict(
    model="llama-tiny", seq_length=16, batch_size=2, num_steps=2, eval_every=1, val_batches=1, warmup_steps=1
)


@pytest.mark.parametrize(
    ("path", "dtype", "said"),
    [
        ("amx", "bfloat16", "bfloat16 chosen for the demo: products on AMX tiles end it sooner"),
        ("avx512_bf16", "bfloat16", "bfloat16 chosen for the demo: products on AVX512-BF16 end it sooner"),
        ("float32", "float32", "float32 chosen for the demo: this processor multiplies bfloat16 as float32"),
    ],
)
def test_the_processor_decides(path: str, dtype: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "path", lambda: path)
    chosen, why = choose_dtype(DEMO_JOB, CPU, 1)
    assert chosen == dtype
    assert why.startswith(said)
    same = [
        *("--seed", "7", "--threads", "1", "--run-dir", "x", "--device", "cpu", "--micro-batch-size", "2", "--json"),
        *("--log", "tensorboard", "--spot-check", "-1", "--sample", "x", "--save-every", "7"),
    ]  # fmt: skip
    for args in ([], same):
        settings, explicit = from_command_line(args)
        assert choose_dtype(settings, CPU, 1) == (chosen, why)
        # As a run asks: with the settings that follow from others.
        assert choose_dtype(resolve(settings, explicit), CPU, 1) == (chosen, why)
    # A resumed run has the dtype that it recorded.
    assert choose_dtype(dataclasses.replace(DEMO_JOB, dtype="float32", resume=True), CPU, 1) == (
        "float32",
        "",
    )


@pytest.mark.parametrize(
    ("args", "backend", "processes", "dtype"),
    [
        (["--dtype", "float32"], CPU, 1, "float32"),
        (["--dtype", "bfloat16"], CPU, 1, "bfloat16"),
        (["--num-steps", "20"], CPU, 1, "float32"),
        (["--z-loss", "1e-3"], CPU, 1, "float32"),
        (["--weight-decay", "0.3"], CPU, 1, "float32"),
        (["--beta1", "0.8"], CPU, 1, "float32"),
        (["--grad-clip", "0"], CPU, 1, "float32"),
        (["--mask-documents"], CPU, 1, "float32"),
        (["--no-shuffle"], CPU, 1, "float32"),
        (["--recompute"], CPU, 1, "float32"),
        (["--epochs", "2"], CPU, 1, "float32"),
        (["--patience", "1"], CPU, 1, "float32"),
        (["--corpus", "x", "--model", "llama-demo"], CPU, 1, "float32"),
        ([], CPU, 2, "float32"),
        ([], SimpleNamespace(name="cuda", dtypes=("bfloat16", "float32")), 1, "bfloat16"),
        ([], SimpleNamespace(name="reference", dtypes=("float64",)), 1, "float64"),
    ],
)
def test_nothing_else_is_decided(
    args: list[str], backend: Any, processes: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A named dtype, another job, several processes and other backends, on a processor that multiplies bfloat16."""
    monkeypatch.setattr(tiles, "path", lambda: "amx")
    assert choose_dtype(from_command_line(args)[0], backend, processes) == (dtype, "")


@pytest.mark.parametrize("path", ["avx512_bf16", "float32"])
def test_a_run_says_which_and_why(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The inputs of a job that stands in the place of the demo's, and the lines about its device."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n\n" for i in range(2000)))
    job = dataclasses.replace(DEMO_JOB, **SMALL, corpus=str(text))
    monkeypatch.setattr(demo, "DEMO", DEMO | SMALL | {"corpus": str(text)})
    monkeypatch.setattr(inputs, "load_config", _with_vocabulary)
    real = tiles.path()
    monkeypatch.setattr(tiles, "path", lambda: path)
    # The kernels of bfloat16 are those of the real processor.
    monkeypatch.setattr(CPU, "empty", lambda shape, dtype: None)
    opened = inputs.open_inputs(job)
    assert opened.settings.dtype == ("bfloat16" if path != "float32" else "float32"), real
    run = SimpleNamespace(path=tmp_path)
    shown = [text for _, text in summary.opening(opened, run)]  # type: ignore[arg-type]
    assert opened.dtype_note in shown
    assert is_demo(job)
    assert not is_demo(Settings())


def _with_vocabulary(name: str) -> Any:
    """The configuration of a preset with a vocabulary that a small text fills."""
    from apr.model.presets import load_config

    return dataclasses.replace(load_config(name), vocab_size=300)
