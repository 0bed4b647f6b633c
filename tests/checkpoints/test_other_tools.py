"""Files that other tools wrote, read by apr; files that apr wrote, read by other code; faults that writer and reader share."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import interop_cases
from apr import backends
from apr.checkpoints import exporting, gguf, gguf_reader, hf, other_readers, peft_write
from apr.checkpoints.checkpoint import parameters
from apr.checkpoints.exporting import export_gguf, export_hf
from apr.checkpoints.other_readers import compare_adapter, compare_folder, compare_gguf, safetensors
from apr.checkpoints.peft import add_adapter, read_adapter
from apr.checkpoints.peft_write import adapter_tensors, write_adapter
from apr.checkpoints.registry import open_any
from apr.common.errors import IOFailure
from apr.model.lora import LINEAR, AdapterLayout, LoraConfig
from apr.model.params import Layout
from apr.model.taps import Record
from apr.model.transformer import Model

OTHERS = Path(__file__).parents[1] / "golden" / "others"
COMPUTED = json.loads((OTHERS / "computed.json").read_text())
CLOSE = 2e-5  # of the largest logit: float32, two programs that add up in other orders
ROUNDED = {"qwen2": 0.05, "llama": 5e-3}  # of weights in Q8_0, in float16
package = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")


def logits(source, adapter=None):
    """The last logits of the ids that the tool took, float32 (3, V)."""
    be, loaded = backends.get("cpu"), open_any(str(source))
    ids = np.array([COMPUTED["ids"]], np.int32)
    w = loaded.on(be)
    if adapter is not None:
        add_adapter(Layout(loaded.cfg), w, read_adapter(str(adapter), loaded.cfg))
    model = Model(loaded.cfg, be, *ids.shape, train=False, loss_rows=ids.size, w=w)
    seen = Record(be)
    model.forward(ids, seen)
    model.loss(np.zeros(ids.shape, np.int32), tap=seen)
    return seen.seen["logits"][-len(COMPUTED["logits"]["qwen2"]) :]


def off(got, name):
    want = np.array(COMPUTED["logits"][name])
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_what_transformers_saved_computes_the_same(name):
    assert off(logits(OTHERS / name), name) <= CLOSE


def test_what_peft_saved_computes_the_same():
    assert off(logits(OTHERS / "llama"), "adapter") > 100 * CLOSE
    assert off(logits(OTHERS / "llama", OTHERS / "adapter"), "adapter") <= CLOSE


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_what_the_package_gguf_wrote_is_the_same_model(name):
    theirs, ours = open_any(str(OTHERS / f"{name}.gguf")), open_any(str(OTHERS / name))
    for slot in Layout(ours.cfg).in_order():
        a, b = (np.asarray(m.tensors[slot.hf], np.float32) for m in (theirs, ours))
        assert np.abs(a - b).max() <= ROUNDED[name] * np.abs(b).max(), slot.hf
    assert off(logits(OTHERS / f"{name}.gguf"), name) <= ROUNDED[name]


@pytest.mark.parametrize(("name", "dtype"), [("qwen2", "q8_0"), ("llama", "float16")])
def test_our_gguf_has_the_bytes_of_theirs(name, dtype, tmp_path):
    export_gguf(open_any(str(OTHERS / name)), tmp_path / "m.gguf", dtype)
    files = [package.GGUFReader(p) for p in (tmp_path / "m.gguf", OTHERS / f"{name}.gguf")]
    ours, theirs = ({t.name: (t.tensor_type, t.data.tobytes()) for t in f.tensors} for f in files)
    assert ours == theirs
    own = {"general.file_type", "general.quantization_version", "general.name"}
    for key in files[1].fields.keys() - own:
        if not key.startswith("GGUF."):
            assert files[0].fields[key].contents() == files[1].fields[key].contents(), key


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_our_folder_has_the_tensors_of_theirs(name, tmp_path):
    export_hf(open_any(str(OTHERS / name)), tmp_path / "out")
    files = ({n: t for p in folder.glob("*.safetensors") for n, t in safetensors(p).items()}
             for folder in (tmp_path / "out", OTHERS / name))  # fmt: skip
    ours, theirs = ({n: (t.tag, t.shape, t.data.tobytes()) for n, t in f.items()} for f in files)
    assert ours == theirs


# Sound work of all families and dtypes


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    for name, case in interop_cases.CASES.items():
        interop_cases.write(case, folder / name)
    return folder


@pytest.mark.parametrize("name", interop_cases.CASES)
def test_every_export_is_read_by_other_code(name, sources, tmp_path):
    checkpoint = open_any(str(sources / name))
    count = sum(x.size for x in parameters(Layout(checkpoint.cfg), checkpoint).values())
    for dtype in (None, "bfloat16"):
        assert export_hf(checkpoint, tmp_path / f"hf-{dtype}", dtype)["compared_apart"] == count
    for dtype in (None, "float16", "q8_0"):
        assert export_gguf(checkpoint, tmp_path / f"{dtype}.gguf", dtype)["compared_apart"] == count


def test_adapters_are_read_by_other_code(tmp_path, monkeypatch):
    cfg, seen = open_any(str(OTHERS / "llama")).cfg, []
    right = other_readers.compare_adapter
    monkeypatch.setattr(peft_write, "compare_adapter", lambda *a: seen.append(right(*a)))
    for targets in (tuple(LINEAR), ("wq", "wdown")):
        layout = AdapterLayout(cfg, LoraConfig(3, 7.5, targets))
        flat = np.random.default_rng(1).standard_normal(layout.size, np.float32)
        write_adapter(tmp_path / targets[0] / str(len(targets)), layout, flat, "base")
        assert seen[-1] == layout.num_parameters


# Faults that writer and reader of apr share: each read by apr is as written


def rows_are_not_turned(m):
    for module in (gguf, gguf_reader):
        for name in ("to_adjacent", "to_halves"):
            if hasattr(module, name):
                m.setattr(module, name, lambda x, heads: x)


def two_names_are_exchanged(m):
    """In the table that both directions use."""
    wrong = {**gguf.NAMES, "wgate": gguf.NAMES["wup"], "wup": gguf.NAMES["wgate"]}
    for module in (gguf, gguf_reader):
        if hasattr(module, "NAMES"):
            m.setattr(module, "NAMES", wrong)


def halves_are_cut_off(m):
    """bfloat16 by truncation, in what is written and in what it is compared with."""
    right = gguf.convert

    def convert(name, array, kind):
        if kind != "BF16":
            return right(name, array, kind)
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(gguf.BF16)

    m.setattr(gguf, "convert", convert)


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [(rows_are_not_turned, None), (two_names_are_exchanged, None), (halves_are_cut_off, "bfloat16")],
)
def test_a_fault_of_writer_and_reader_is_seen_by_other_code_alone(
    fault, dtype, sources, tmp_path, monkeypatch
):
    checkpoint = open_any(str(sources / "llama"))
    with monkeypatch.context() as m:
        fault(m)
        with pytest.raises(IOFailure, match="other code than apr's own"):
            export_gguf(checkpoint, tmp_path / "m.gguf", dtype)
        m.setattr(exporting, "compare_gguf", lambda *a: 0)
        assert export_gguf(checkpoint, tmp_path / "again.gguf", dtype)["tensors"]


def test_a_name_that_writer_and_reader_of_a_folder_share(sources, tmp_path, monkeypatch):
    checkpoint = open_any(str(sources / "llama"))
    right_write, right_read = hf.write_safetensors, hf.read_safetensors

    swapped = {"k_proj": "q_proj", "q_proj": "k_proj"}

    def other(tensors):
        return {re.sub("[kq]_proj", lambda m: swapped[m[0]], name): x for name, x in tensors.items()}

    with monkeypatch.context() as m:
        m.setattr(
            hf, "write_safetensors", lambda path, tensors, *a, **k: right_write(path, other(tensors), *a, **k)
        )
        m.setattr(hf, "read_safetensors", lambda *a, **k: other(right_read(*a, **k)))
        with pytest.raises(IOFailure, match="other code than apr's own"):
            export_hf(checkpoint, tmp_path / "out")
        m.setattr(exporting, "compare_folder", lambda *a: 0)
        export_hf(checkpoint, tmp_path / "again")


def test_names_and_values_of_adapters(tmp_path, monkeypatch):
    cfg = open_any(str(OTHERS / "llama")).cfg
    layout = AdapterLayout(cfg, LoraConfig(3, 7.5, ("wq", "wv")))
    flat = np.random.default_rng(1).standard_normal(layout.size, np.float32)
    monkeypatch.setattr("apr.model.lora.PREFIX", "base_model.")
    with pytest.raises(IOFailure, match="that PEFT looks for"):
        write_adapter(tmp_path / "names", AdapterLayout(cfg, LoraConfig(3, 7.5, ("wq", "wv"))), flat, "base")
    monkeypatch.undo()
    write_adapter(tmp_path / "a", layout, flat, "base")
    want, key = (
        adapter_tensors(layout, flat),
        "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight",
    )
    want[key] = want[key][::-1]
    with pytest.raises(IOFailure, match=r"1\.self_attn\.v_proj\.lora_B"):
        compare_adapter(tmp_path / "a", cfg.num_layers, want)


@pytest.mark.parametrize("where", [200, -7])
def test_a_byte_that_changed_after_our_own_comparison(where, sources, tmp_path):
    checkpoint = open_any(str(sources / "qwen2-untied"))
    want = parameters(Layout(checkpoint.cfg), checkpoint)
    export_hf(checkpoint, tmp_path / "out")
    export_gguf(checkpoint, tmp_path / "m.gguf")
    file = next((tmp_path / "out").glob("*.safetensors"))
    for path, compare in (
        (file, lambda: compare_folder(tmp_path / "out", want, False)),
        (tmp_path / "m.gguf", lambda: compare_gguf(tmp_path / "m.gguf", checkpoint.cfg, want)),
    ):
        data = bytearray(path.read_bytes())
        data[-4 if where > 0 else where] ^= 4
        path.write_bytes(data)
        with pytest.raises(IOFailure):
            compare()


def test_a_folder_that_lost_a_tensor(tmp_path):
    checkpoint = open_any(str(OTHERS / "qwen2"))
    want = parameters(Layout(checkpoint.cfg), checkpoint)
    shutil.copytree(OTHERS / "qwen2", tmp_path / "hf")
    assert compare_folder(tmp_path / "hf", want, True) == sum(x.size for x in want.values())
    less = {
        name: x for name, x in hf.read_hf(tmp_path / "hf").tensors.items() if "layers.1.mlp.up" not in name
    }
    hf.write_safetensors(tmp_path / "hf" / "model.safetensors", less)
    with pytest.raises(IOFailure, match="not in both"):
        compare_folder(tmp_path / "hf", want, True)
