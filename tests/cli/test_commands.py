"""`apr run`, `trace`, `plan`, `inspect` as a user calls them: output, exit codes, --json."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from apr import backends
from apr.checkpoints.hf import read_safetensors
from apr.cli.main import COMMANDS, main
from apr.model.cost import attended, flops_per_token, memory
from apr.model.optim import AdamW
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from small_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random llama with a tokenizer, as an .apr file and as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    return write_checkpoint(folder)


def call(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_names_every_command(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["nope"], 2, "unknown command"),
        ([], 2, None),
        (["run"], 2, "MODEL"),
        (["run", "no/such/model"], 3, "no/such/model"),
        (["run", "MODEL", "x", "--temperature", "-1"], 2, "--temperature"),
        (["run", "MODEL", "x", "--top-p", "0"], 2, "--top-p"),
        (["run", "MODEL", "x", "--device", "tpu"], 8, "tpu"),
        (["run", "MODEL", "x", "--device", "cuda"], 8, "cuda"),
        (["run", "MODEL", "x", "--threads", "4096"], 2, "4096"),
        (["trace", "MODEL"], 2, "--tokens"),
        (["trace", "MODEL", "--tokens", "1,x", "-o", "OUT"], 2, "1,x"),
        (["trace", "MODEL", "--tokens", "1,99999", "-o", "OUT"], 5, "99999"),
        (["trace", "MODEL", "--tokens", "1,-3", "-o", "OUT"], 5, "-3"),
        (["trace", "MODEL", "--tokens", "none.json", "-o", "OUT"], 3, "none.json"),
        (["trace", "MODEL", "--tokens", "1,2", "--dtype", "float64", "-o", "OUT"], 5, "float64"),
        (["trace", "MODEL", "--tokens", ",".join(["1"] * 65), "-o", "OUT"], 5, "max_position_embeddings"),
        (["plan"], 2, "--model"),
        (["plan", "--model", "gpt-5"], 3, "gpt-5"),
        (["inspect", "no/such"], 3, "no/such"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, checkpoint, tmp_path, args, code, words):
    args = [{"MODEL": str(checkpoint / "m.apr"), "OUT": str(tmp_path / "t")}.get(a, a) for a in args]
    got, out, err = call(capsys, *args)
    assert got == code
    assert "Traceback" not in out + err
    if words:
        assert words in err
        assert err.startswith("apr")


def test_run_is_the_same_for_both_formats_and_repeats(capsys, checkpoint):
    texts = []
    for model in ("m.apr", "hf", "m.apr"):
        code, out, _ = call(capsys, "run", checkpoint / model, "def ", "--max-tokens", 12, "--seed", 5)
        assert code == 0
        assert out.startswith("def ")
        texts.append(out)
    assert texts[0] == texts[1] == texts[2]
    assert call(capsys, "run", checkpoint / "hf", "def ", "--max-tokens", 12, "--seed", 6)[1] != texts[0]


def test_run_json_is_one_document(capsys, checkpoint):
    code, out, _ = call(
        capsys, "run", checkpoint / "hf", "def ", "--max-tokens", 5, "--temperature", 0, "--json"
    )
    d = json.loads(out)
    assert code == 0
    assert len(d["ids"]) == 5
    assert d["text"].startswith("def ")


def test_trace_holds_what_the_interface_promises(capsys, checkpoint, tmp_path):
    out = tmp_path / "t.safetensors"
    code, _, _ = call(
        capsys,
        "trace",
        checkpoint / "hf",
        "--tokens",
        "1,2,3,4,5",
        "--backward",
        "-o",
        out,
        "--backend",
        "reference",
    )
    t = read_safetensors(out)
    assert code == 0
    for i in range(3):
        assert t[f"hidden.{i}"].shape == (1, 5, 40)
        assert t[f"d_hidden.{i}"].dtype == np.float64
    assert t["final_norm"].shape == (1, 5, 40)
    assert t["logits"].shape[:2] == (1, 5)
    assert t["loss"].shape == (1,)
    names = {s.hf for s in Layout(dataclasses.replace(PRESETS["llama-tiny"])).slots}
    assert {k[5:] for k in t if k.startswith("grad.")} == names
    want = -np.log(np.exp(t["logits"][0]) / np.exp(t["logits"][0]).sum(-1, keepdims=True))
    assert abs(want[np.arange(4), [2, 3, 4, 5]].mean() - t["loss"][0]) < 1e-12


def test_trace_of_both_backends_agrees_and_of_other_weights_does_not(capsys, tmp_path):
    traces = {}
    for backend, seed in (("reference", 1), ("cpu", 1), ("cpu", 2)):
        path = tmp_path / f"{backend}{seed}"
        args = ["trace", "qwen3-tiny", "--tokens", "5,7,11,13,17", "--backward", "-o", path, "--seed", seed]
        assert call(capsys, *args, "--backend", backend)[0] == 0
        traces[backend, seed] = read_safetensors(path)
    want = traces["reference", 1]
    assert sorted(want) == sorted(traces["cpu", 1])
    worst = {
        seed: max(
            np.abs(traces["cpu", seed][k] - want[k]).max() / (np.abs(want[k]).max() + 1e-30) for k in want
        )
        for seed in (1, 2)
    }
    assert worst[1] < 1e-4 < 1e-2 < worst[2]


def test_trace_reads_ids_and_targets_from_files(capsys, tmp_path):
    np.save(tmp_path / "ids.npy", np.array([[1, 2, 3], [4, 5, 6]]))
    (tmp_path / "targets.json").write_text("[[2, -100, -100], [-100, -100, 7]]")
    args = [
        "trace",
        "llama-tiny",
        "--tokens",
        tmp_path / "ids.npy",
        "--targets",
        tmp_path / "targets.json",
        "--json",
    ]
    code, out, _ = call(capsys, *args, "-o", tmp_path / "o")
    assert code == 0
    assert json.loads(out)["loss"] > 0
    assert read_safetensors(tmp_path / "o")["hidden.0"].shape == (2, 3, 40)


@pytest.mark.parametrize("name", [n for n in PRESETS if n.endswith("tiny")])
@pytest.mark.parametrize("train", [True, False])
def test_plan_counts_every_byte(name, train):
    be, cfg = backends.get("cpu"), PRESETS[name]
    cache = 0 if train else 11
    before = be.memory()
    model = Model(cfg, be, 3, 7, train=train, loss_rows=4, cache=cache)
    if train:
        AdamW.of(model)
    assert be.memory() - before == memory(cfg, be, 3, 7, train=train, loss_rows=4, cache=cache).total


def test_flops_formula():
    c = PRESETS["mistral-tiny"]
    assert attended(c.sliding_window, 8) == (1 + 2 + 3 + 4 + 5 + 5 + 5 + 5) / 8
    assert attended(0, 8) == 4.5
    matrices = 2 * (4 * 40 * 40 + 3 * 40 * 56) + 123 * 40
    assert flops_per_token(c, 8) == 6 * matrices + 12 * 2 * 40 * attended(c.sliding_window, 8)


def test_plan_counts_the_borders_of_documents(capsys):
    asked = (
        "plan",
        "--model",
        "llama-tiny",
        "--batch-size",
        8,
        "--seq-length",
        32,
        "--device",
        "cpu",
        "--json",
    )
    plain, masked = (
        json.loads(call(capsys, *asked, *more)[1])["bytes"] for more in ((), ("--mask-documents",))
    )
    assert masked == {**plain, "scratch": plain["scratch"] + 4 * 8 * 32, "total": plain["total"] + 4 * 8 * 32}


def test_plan_of_a_known_model(capsys):
    code, out, _ = call(capsys, "plan", "--model", "qwen2.5-0.5b", "--micro-batch-size", 1, "--json")
    d = json.loads(out)
    assert code == 0
    assert (d["parameters"], d["tensors"]) == (494_032_768, 290)
    assert d["bytes"]["weights"] == 4 * 494_032_768
    assert d["tokens_per_sec_limit"] > 0


def test_inspect(capsys, checkpoint):
    shas = set()
    for model in ("m.apr", "hf"):
        code, out, _ = call(capsys, "inspect", checkpoint / model, "--json", "--tensors")
        d = json.loads(out)
        assert code == 0
        assert d["config"]["num_layers"] == 2
        assert d["tokenizer"]["vocab_size"] == d["config"]["vocab_size"]
        shas.add(d["weights_sha256"])
    assert len(shas) == 1


def test_inspect_finds_a_damaged_file(capsys, checkpoint, tmp_path):
    data = bytearray((checkpoint / "m.apr").read_bytes())
    data[-100] ^= 1
    (tmp_path / "bad.apr").write_bytes(data)
    code, _, err = call(capsys, "inspect", tmp_path / "bad.apr")
    assert code == 4
    assert "bad.apr" in err


def npy(shape: str, data: bytes = b"", descr: str = "'<i8'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("x.npy", npy("(1000000000000,)", bytes(8)), 4, "mmap length is greater"),
        ("x.npy", npy("(-1,)", bytes(8)), 4, "not an array of ids"),
        ("x.npy", npy(f"({2**62}, {2**62})", bytes(8)), 4, "not an array of ids"),
        ("x.npy", npy("(1,)", bytes(8), "'|O'"), 4, "not an array of ids"),
        ("x.npy", npy("(1L,)", bytes(8)), 4, "not an array of ids"),
        ("x.npy", npy("(" * 200), 4, "not an array of ids"),
        ("x.npy", b"\x93NUMPY\x03\x00\xff\xff\xff\x7f{", 4, "not an array of ids"),
        ("x.npy", b"PK\x03\x04", 4, "not an array of ids"),
        ("x.npy", b"\x80\x04.", 4, "not an array of ids"),
        ("x.npy", b"", 4, "not an array of ids"),
        ("x.json", json.dumps(["x" * 10_000] * 1000).encode(), 4, "not an array of ids"),
        ("x.json", b"[true, false]", 4, "not an array of ids"),
        ("x.json", b'{"a": 1}', 4, "not an array of ids"),
        ("x.json", b"[[1, 2], [3]]", 2, "expected whole numbers"),
        ("x.json", b"[[1, 2], 3]", 4, "not an array of ids"),
        ("x.json", b"[1, " + b"9" * 400 + b"]", 2, "expected whole numbers"),
        ("x.json", b"[1, 99999]", 5, "id 99999 is outside"),
    ],
)
def test_hostile_files_of_ids(capsys, checkpoint, tmp_path, name, content, code, words):
    (tmp_path / name).write_bytes(content)
    args = ("trace", checkpoint / "m.apr", "--tokens", tmp_path / name, "-o", tmp_path / "t")
    got, _, err = call(capsys, *args)
    assert (got, words in err, name in err) == (code, True, True), err


def test_files_of_ids_are_read(capsys, checkpoint, tmp_path):
    np.save(tmp_path / "x.npy", np.array([[1, 2, 3]], np.int16))
    (tmp_path / "x.json").write_text("[[1, 2, 3]]")
    for name in ("x.npy", "x.json"):
        args = ("trace", checkpoint / "m.apr", "--tokens", tmp_path / name, "-o", tmp_path / f"{name}.t")
        assert call(capsys, *args)[0] == 0
    assert (tmp_path / "x.npy.t").read_bytes() == (tmp_path / "x.json.t").read_bytes()
