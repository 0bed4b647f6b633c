"""`apr import` and `apr export`: bit for bit in, bit for bit out, nothing left behind; faults of writing are seen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import interop_cases
from apr.checkpoints import exporting, importing
from apr.checkpoints.apr2 import read_apr, write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from apr.checkpoints.exporting import export_hf, parse_size
from apr.checkpoints.hf import read_hf, read_safetensors, write_hf, write_safetensors
from apr.checkpoints.importing import import_model
from apr.checkpoints.registry import open_any
from apr.cli.main import main
from apr.common.errors import InputNotFound, IOFailure, MalformedFile, Refused, UsageError
from apr.model.params import Layout
from apr.model.presets import PRESETS

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/interop.json").read_text())["cases"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded bfloat16 checkpoint with a chat template, as somebody else could have published it."""
    folder = tmp_path_factory.mktemp("source") / "src"
    interop_cases.write(interop_cases.CASES["qwen2"], folder)
    return folder


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


# --- what transformers and llama.cpp have loaded


@pytest.mark.parametrize("name", interop_cases.CASES)
def test_exported_files_are_those_that_transformers_loaded(name: str, tmp_path: Path) -> None:
    """tools/golden/interop.py had transformers load these very bytes: equal logits, ids, chat and generation config."""
    case, want = interop_cases.CASES[name], GOLDEN[name]["hf"]
    interop_cases.write(case, tmp_path / "src")
    import_model(str(tmp_path / "src"), tmp_path / "m.apr")
    export_hf(open_any(str(tmp_path / "m.apr")), tmp_path / "hf", max_shard_bytes=50_000)
    got = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "hf").iterdir()}
    # The library may spell a tokenizer otherwise in another version; that it comes back is tested below.
    assert {n: h for n, h in got.items() if n != "tokenizer.json"} == {
        n: h for n, h in want["files"].items() if n != "tokenizer.json"
    }
    assert want["reload_max_abs"] == 0
    assert want["apr_max_abs"] < 2e-5 * GOLDEN[name]["largest_logit"]


# --- round trips


def test_hugging_face_to_apr_and_back_is_equal_in_every_byte(source: Path, tmp_path: Path) -> None:
    import_model(str(source), tmp_path / "a.apr")
    export_hf(open_any(str(tmp_path / "a.apr")), tmp_path / "hf", max_shard_bytes=50_000)
    for path in source.iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((tmp_path / "hf").iterdir())) == len(list(source.iterdir()))
    import_model(str(tmp_path / "hf"), tmp_path / "b.apr")
    a, b = (read_apr(tmp_path / f"{x}.apr") for x in "ab")
    assert all(same(a.tensors[n], b.tensors[n]) for n in a.tensors)
    ours = {"source", "provenance", "created_at"}
    assert {k: v for k, v in a.metadata.items() if k not in ours} == {
        k: v for k, v in b.metadata.items() if k not in ours
    }
    assert [f["sha256"] for f in a.metadata["provenance"]["files"]] == [
        f["sha256"] for f in b.metadata["provenance"]["files"]
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name.endswith("-tiny")])
def test_every_family_and_dtype_keeps_its_bits(preset: str, dtype: str, tmp_path: Path) -> None:
    for tied in (True, False):
        cfg = dataclasses.replace(PRESETS[preset], tie_word_embeddings=tied)
        layout = Layout(cfg)
        host = np.zeros(layout.size, np.float32)
        layout.randomise(host, 1)
        folder = tmp_path / f"src{tied}"
        write_hf(folder, cfg, layout.named(host), dtype)
        figures = import_model(str(folder), tmp_path / f"{tied}.apr")
        assert figures["compared_elements"] == layout.num_parameters
        export_hf(open_any(str(tmp_path / f"{tied}.apr")), tmp_path / f"out{tied}")
        a, b = read_hf(folder), read_hf(tmp_path / f"out{tied}")
        assert a.cfg == b.cfg == cfg
        assert a.config == b.config
        assert set(a.tensors) == set(b.tensors)
        assert all(same(a.tensors[n], b.tensors[n]) for n in a.tensors)


def test_import_keeps_everything_and_says_where_it_is_from(source: Path, tmp_path: Path) -> None:
    figures = import_model(str(source), tmp_path / "m.apr")
    meta = read_apr(tmp_path / "m.apr").metadata
    config = json.loads((source / "config.json").read_text())
    assert meta["hf_config"] == config
    assert meta["hf_files"]["config.json"] == (source / "config.json").read_text()
    assert json.loads(meta["hf_files"]["generation_config.json"])["eos_token_id"] == config["eos_token_id"]
    assert meta["tokenizer.json"] == (source / "tokenizer.json").read_text()
    assert meta["chat_template"] == interop_cases.TEMPLATE
    assert meta["original_format"] == "safetensors"
    assert meta["provenance"]["source"] == str(source)
    named = {f["name"]: f for f in meta["provenance"]["files"]}
    assert set(named) == {p.name for p in source.iterdir()}
    for path in source.iterdir():
        data = path.read_bytes()
        assert named[path.name]["sha256"] == hashlib.sha256(data).hexdigest()
        assert named[path.name]["bytes"] == len(data)
    assert (figures["eos_token"], figures["chat_template"]) == ("<|im_end|>", True)
    tok = open_any(str(tmp_path / "m.apr")).tokenizer
    assert tok is not None
    assert (tok.eos_token, tok.eos_id) == ("<|im_end|>", meta["tokenizer.eos_token_id"])
    assert meta["tokenizer.bos_token_id"] == config["bos_token_id"]


def test_import_of_one_safetensors_file(tmp_path: Path) -> None:
    interop_cases.write(interop_cases.CASES["llama"], tmp_path / "src")
    loaded = open_any(str(tmp_path / "src"))
    shutil.copytree(tmp_path / "src", tmp_path / "one", ignore=shutil.ignore_patterns("*.safetensors*"))
    write_hf(tmp_path / "w", loaded.cfg, dict(loaded.tensors), None)
    shutil.move(tmp_path / "w/model.safetensors", tmp_path / "one/weights.safetensors")
    import_model(str(tmp_path / "one/weights.safetensors"), tmp_path / "m.apr")
    meta = read_apr(tmp_path / "m.apr").metadata
    assert "weights.safetensors" in {f["name"] for f in meta["provenance"]["files"]}
    assert open_any(str(tmp_path / "m.apr")).sha256 == loaded.sha256


def test_a_tied_head_that_is_stored_twice_or_under_the_heads_name(tmp_path: Path) -> None:
    """Both are compared with the one matrix that an .apr file holds."""
    interop_cases.write(interop_cases.CASES["llama"], tmp_path / "src")
    loaded = open_any(str(tmp_path / "src"))
    for name, change in (("twice", {"lm_head.weight"}), ("head", {"lm_head.weight", "-"})):
        tensors = dict(loaded.tensors) | {"lm_head.weight": loaded.tensors["model.embed_tokens.weight"]}
        if "-" in change:
            del tensors["model.embed_tokens.weight"]
        folder = tmp_path / name
        folder.mkdir()
        from apr.checkpoints.hf import write_safetensors

        write_safetensors(folder / "model.safetensors", tensors)
        shutil.copy(tmp_path / "src/config.json", folder)
        done = import_model(str(folder), tmp_path / f"{name}.apr")
        extra = loaded.tensors["model.embed_tokens.weight"].size if name == "twice" else 0
        assert done["compared_elements"] == done["parameters"] + extra
        assert open_any(str(tmp_path / f"{name}.apr")).sha256 == loaded.sha256


def test_a_tokenizer_from_elsewhere_and_none(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert import_model(str(bare), tmp_path / "none.apr")["tokenizer_ids"] is None
    export_hf(open_any(str(tmp_path / "none.apr")), tmp_path / "none")
    assert not (tmp_path / "none/tokenizer.json").exists()
    done = import_model(str(bare), tmp_path / "given.apr", tokenizer=str(source))
    assert done["eos_token"] == "<|im_end|>"
    with pytest.raises(InputNotFound, match=r"--tokenizer .* holds no tokenizer.json"):
        import_model(str(bare), tmp_path / "x.apr", tokenizer=str(bare))


def test_added_tokens_that_only_tokenizer_config_states(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "src"
    shutil.copytree(source, folder)
    text = json.loads((folder / "tokenizer.json").read_text())
    gone = text["added_tokens"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(text))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(gone["id"]): {k: v for k, v in gone.items() if k != "id"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    done = import_model(str(folder), tmp_path / "m.apr")
    assert (done["eos_token"], done["eos_token_id"]) == (gone["content"], gone["id"])


def test_chat_template_in_a_file_of_its_own_comes_first(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "src"
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    import_model(str(folder), tmp_path / "m.apr")
    assert read_apr(tmp_path / "m.apr").metadata["chat_template"] == "{{ messages }}\n"
    export_hf(open_any(str(tmp_path / "m.apr")), tmp_path / "hf")
    assert (tmp_path / "hf/chat_template.jinja").read_text() == "{{ messages }}\n"


# --- the Hub


def test_import_from_the_hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[Any] = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(source)

    monkeypatch.setattr(hub, "snapshot_download", download)
    done = import_model("hf://org/name@v1", tmp_path / "m.apr")
    assert done["revision"] == source.name  # the folder of a snapshot is called like its commit
    assert asked[0][:2] == ("org/name", "v1")
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors"} <= set(
        asked[0][2]
    )
    meta = read_apr(tmp_path / "m.apr").metadata
    assert (meta["source"], meta["provenance"]["revision"]) == ("hf://org/name@v1", source.name)
    import_model("hf://org/name", tmp_path / "m2.apr", revision="v2")
    assert asked[1][1] == "v2"


def test_shards_come_from_the_hub_by_the_names_of_the_index(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    tensors = open_any(str(source)).tensors
    cached, names = tmp_path / "cache", ["model.safetensors-00001-of-00002.safetensors", "b.safetensors"]
    cached.mkdir()
    shutil.copy(source / "config.json", cached)
    where = {name: names[i % 2] for i, name in enumerate(tensors)}
    (cached / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        for file in set(names) & set(allow_patterns):
            write_safetensors(cached / file, {n: np.array(tensors[n]) for n in where if where[n] == file})
        return str(cached)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert import_model("hf://org/name", tmp_path / "m.apr")["tensors"] == len(tensors)
    (cached / "model.safetensors.index.json").unlink()
    with pytest.raises(InputNotFound, match=r"has neither .*from_pretrained\('org/name'\)\.save_pretrained"):
        import_model("hf://org/name@v1", tmp_path / "m2.apr")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PermissionError(13, "Permission denied", "/home/a/.cache/huggingface"),
            "/home/a/.cache/huggingface: .*set HF_HOME",
        ),
        (OSError(28, "No space left on device", "/home/a/x"), "/home/a/x: No space left"),
    ],
)
def test_a_download_that_fails(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot be written is no fault of the network."""
    hub = pytest.importorskip("huggingface_hub")

    def download(*args: Any, **more: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(IOFailure, match=said):
        import_model("hf://org/name", Path("m.apr"))


@pytest.mark.parametrize(
    ("source", "revision", "kind", "words"),
    [
        ("https://huggingface.co/org/name", None, UsageError, "hf://org/name"),
        ("hf://name", None, UsageError, "hf://org/name"),
        ("hf://org/name@a", "b", UsageError, "Say one"),
        ("here", "b", UsageError, "--revision b"),
        ("no/such", None, InputNotFound, "no/such"),
    ],
)
def test_sources_that_make_no_sense(
    source: str, revision: str | None, kind: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words):
        import_model(source, tmp_path / "m.apr", revision)
    assert not (tmp_path / "m.apr").exists()


# --- nothing is overwritten, and what is written is compared


def test_nothing_that_exists_is_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.apr"
    out.write_text("mine")
    with pytest.raises(Refused, match="exists already"):
        import_model(str(source), out)
    assert out.read_text() == "mine"
    import_model(str(source), out, force=True)
    checkpoint = open_any(str(out))
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "pytorch_model.bin"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(Refused, match=f"already holds {name}"):
            export_hf(checkpoint, folder)
        assert [p.name for p in folder.iterdir()] == [name]
    with pytest.raises(Refused, match="is a file"):
        export_hf(checkpoint, out)
    (tmp_path / "readme").mkdir()
    (tmp_path / "readme/README.md").write_text("mine")
    export_hf(checkpoint, tmp_path / "readme")
    assert (tmp_path / "readme/README.md").read_text() == "mine"


def test_a_bit_that_changes_while_it_is_written_is_seen(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: Any) -> dict[str, np.ndarray]:
        out = {n: np.array(t) for n, t in tensors.items()}
        out[name].reshape(-1).view(np.uint16)[-1] ^= 1
        return out

    real = importing.write_apr
    monkeypatch.setattr(importing, "write_apr", lambda path, meta, tensors: real(path, meta, spoil(tensors)))
    with pytest.raises(IOFailure, match=f"{name}.*differ from the source"):
        import_model(str(source), tmp_path / "m.apr")
    monkeypatch.undo()
    import_model(str(source), tmp_path / "m.apr", force=True)
    real_hf = exporting.write_hf
    monkeypatch.setattr(
        exporting, "write_hf", lambda folder, cfg, tensors, *rest: real_hf(folder, cfg, spoil(tensors), *rest)
    )
    with pytest.raises(IOFailure, match=name):
        export_hf(open_any(str(tmp_path / "m.apr")), tmp_path / "hf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_as_another_dtype(dtype: str, source: Path, tmp_path: Path) -> None:
    checkpoint = open_any(str(source))
    done = export_hf(checkpoint, tmp_path / "hf", dtype)
    assert done["dtypes"] == [dtype]
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config == {**json.loads((source / "config.json").read_text()), "torch_dtype": dtype}
    for n, t in read_hf(tmp_path / "hf").tensors.items():
        assert same(t, checkpoint.tensors[n].astype(t.dtype))
    with pytest.raises(UsageError, match="q8_0"):
        export_hf(checkpoint, tmp_path / "x", "q8_0")


def test_shards_keep_to_their_size(source: Path, tmp_path: Path) -> None:
    export_hf(open_any(str(source)), tmp_path / "hf", max_shard_bytes=30_000)
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2
    for path in shards:
        tensors = read_safetensors(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 30_000


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2 << 30), ("1.5kb", 1500), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    for bad in ("", "GB", "-1GB", "0", "1TB"):
        with pytest.raises(UsageError, match="--max-shard-size"):
            parse_size(bad)


# --- checkpoints that apr trained


def trained(folder: Path, preset: str = "llama-tiny") -> Path:
    case = interop_cases.Case(
        dataclasses.replace(PRESETS[preset], vocab_size=interop_cases.VOCAB), "float32", 1
    )
    tok = interop_cases.tokenizer(folder / "tokenizer")
    meta = config_to_metadata(case.cfg)
    embed_tokenizer(meta, tok.json, tok.eos_id)
    write_apr(folder / "t.apr", meta, interop_cases.weights(case))
    return folder / "t.apr"


def test_export_of_a_trained_checkpoint_says_where_a_text_ends(tmp_path: Path) -> None:
    path = trained(tmp_path)
    checkpoint = open_any(str(path))
    eos = checkpoint.metadata["tokenizer.eos_token_id"]
    export_hf(checkpoint, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    # Without the keys transformers would take its defaults: id 1 to begin and id 2 to end.
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (eos, None, None)
    assert config["torch_dtype"] == "float32"
    tokenizer_config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert (tokenizer_config["eos_token"], tokenizer_config["tokenizer_class"]) == (
        "<|endoftext|>",
        "PreTrainedTokenizerFast",
    )
    again = open_any(str(tmp_path / "hf"))
    assert (again.cfg, again.sha256) == (checkpoint.cfg, checkpoint.sha256)
    a, b = checkpoint.tokenizer, again.tokenizer
    assert a is not None
    assert b is not None
    assert (a.json, a.eos_id) == (b.json, b.eos_id)


@pytest.mark.parametrize(
    ("preset", "noted"), [("llama-tiny", False), ("qwen2-tiny", True), ("qwen3-tiny", False)]
)
def test_a_tokenizer_that_transformers_would_replace_is_noted(
    preset: str, noted: bool, tmp_path: Path
) -> None:
    done = export_hf(open_any(str(trained(tmp_path, preset))), tmp_path / "hf")
    assert ("PreTrainedTokenizerFast" in (done["note"] or "")) is noted


def test_a_config_that_was_changed_is_not_given_back(source: Path, tmp_path: Path) -> None:
    """The text of config.json is an original only as long as it describes the model."""
    import_model(str(source), tmp_path / "m.apr")
    apr = read_apr(tmp_path / "m.apr")
    meta = {**apr.metadata, "rope_theta": 5e5, "hf_config": {**apr.metadata["hf_config"], "rope_theta": 5e5}}
    write_apr(tmp_path / "n.apr", meta, dict(apr.tensors))
    export_hf(open_any(str(tmp_path / "n.apr")), tmp_path / "hf")
    assert read_hf(tmp_path / "hf").cfg.rope_theta == 5e5


def test_kept_files_that_are_no_texts(source: Path, tmp_path: Path) -> None:
    import_model(str(source), tmp_path / "m.apr")
    apr = read_apr(tmp_path / "m.apr")
    write_apr(tmp_path / "n.apr", {**apr.metadata, "hf_files": {"config.json": 1}}, dict(apr.tensors))
    with pytest.raises(MalformedFile, match="hf_files"):
        _ = open_any(str(tmp_path / "n.apr")).texts
    more = {**apr.metadata["hf_files"], "../evil.json": "{}"}
    write_apr(tmp_path / "e.apr", {**apr.metadata, "hf_files": more}, dict(apr.tensors))
    export_hf(open_any(str(tmp_path / "e.apr")), tmp_path / "out/hf")
    assert not (tmp_path / "out/evil.json").exists()


# --- real checkpoints


def test_stories_round_trip(data: Callable[[str], Path], tmp_path: Path) -> None:
    source = data("stories260K/hf")
    done = import_model(str(source), tmp_path / "m.apr")
    assert done["compared_elements"] == 260_032
    export_hf(open_any(str(tmp_path / "m.apr")), tmp_path / "hf")
    for path in (source / "config.json", source / "tokenizer.json", source / "tokenizer_config.json"):
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()
    a, b = open_any(str(source)), open_any(str(tmp_path / "hf"))
    assert all(same(a.tensors[n], b.tensors[n]) for n in a.tensors)


def test_qwen2s_own_tokenizer_and_chat_template(data: Callable[[str], Path], tmp_path: Path) -> None:
    """A model of Qwen2's vocabulary, tiny in all else: 7 MB of tokenizer.json fit into the metadata."""
    folder = data("qwen2-tokenizer")
    cfg = dataclasses.replace(
        PRESETS["qwen2-tiny"], vocab_size=151_936, hidden_size=14, num_heads=7, head_dim=2
    )
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.init(host, 1)
    src = tmp_path / "src"
    write_hf(src, cfg, layout.named(host), "bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, src)
    done = import_model(str(src), tmp_path / "m.apr")
    assert done["tokenizer_ids"] >= 151_646
    export = export_hf(open_any(str(tmp_path / "m.apr")), tmp_path / "hf")
    assert export["note"] is None
    assert (tmp_path / "hf/tokenizer_config.json").read_bytes() == (
        folder / "tokenizer_config.json"
    ).read_bytes()
    assert json.loads((tmp_path / "hf/tokenizer.json").read_text()) == json.loads(
        (folder / "tokenizer.json").read_text()
    )


# --- as a user calls it


def test_commands(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apr = tmp_path / "m.apr"
    code, out, _ = call(capsys, "import", source, "-o", apr)
    assert code == 0
    assert "equal bits" in out
    code, _, err = call(capsys, "import", source, "-o", apr)
    assert code == 5
    assert "--force" in err
    code, out, _ = call(capsys, "import", source, "-o", apr, "--force", "--json")
    assert code == 0
    assert json.loads(out)["eos_token"] == "<|im_end|>"
    code, out, _ = call(capsys, "export", apr, "-o", tmp_path / "hf", "--max-shard-size", "50KB", "--json")
    assert code == 0
    assert json.loads(out)["format"] == "hf"
    code, out, _ = call(capsys, "export", apr, "-o", tmp_path / "hf16", "--dtype", "float16")
    assert code == 0
    assert "float16" in out


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["import"], 2, "SOURCE"),
        (["import", "SRC"], 2, "--output"),
        (["import", "SRC/nope", "-o", "OUT"], 3, "nope"),
        (["import", "SRC/config.json", "-o", "OUT"], 2, "Hugging Face folders"),
        (["import", "SRC/nosuffix", "-o", "OUT"], 3, "nosuffix"),
        (["export", "SRC"], 2, "--output"),
        (["export", "SRC", "-o", "OUT", "--format", "onnx"], 2, "onnx"),
        (["export", "SRC", "-o", "OUT", "--dtype", "int4"], 2, "int4"),
        (["export", "SRC", "-o", "OUT", "--dtype", "q8_0"], 2, "q8_0"),
        (["export", "SRC", "-o", "OUT", "--max-shard-size", "x"], 2, "--max-shard-size"),
        (["export", "SRC", "-o", "OUT", "--force"], 2, "--force"),
        (["export", "nope", "-o", "OUT"], 3, "nope"),
    ],
)
def test_bad_input_is_one_clear_line(
    args: list[str], code: int, words: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put = {"SRC": str(source), "OUT": str(tmp_path / "out")}
    got, out, err = call(capsys, *(a.replace("SRC", put["SRC"]).replace("OUT", put["OUT"]) for a in args))
    assert got == code
    assert words in err
    assert "Traceback" not in err
    assert not out
    assert not (tmp_path / "out").exists()


def test_inspect_shows_tokenizer_template_and_provenance(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_model(str(source), tmp_path / "m.apr")
    code, out, _ = call(capsys, "inspect", tmp_path / "m.apr", "--json", "--tensors")
    assert code == 0
    said = json.loads(out)
    assert said["provenance"]["source"] == str(source)
    assert said["chat_template"] == interop_cases.TEMPLATE
    assert set(said["tokenizer"]["added_tokens"].values()) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert said["tokenizer"]["eos_token"] == "<|im_end|>"
    assert said["tensor_bytes"] == sum(t["bytes"] for t in said["tensors"].values())
    x = open_any(str(source)).tensors["model.norm.weight"].astype(np.float64)
    shown = said["tensors"]["model.norm.weight"]
    assert (shown["max"], shown["not_finite"]) == (np.abs(x).max(), 0)
    assert shown["rms"] == pytest.approx(np.sqrt((x**2).mean()))
    code, out, _ = call(capsys, "inspect", tmp_path / "m.apr")
    assert code == 0
    for words in ("chat template", "added tokens", "generation_config.json", str(source), "bfloat16"):
        assert words in out
    code, out, _ = call(capsys, "inspect", source)
    assert code == 0
    assert "chat template" in out


def test_inspect_of_files_that_are_no_model_to_load(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace/t.safetensors"
    trace.parent.mkdir()
    code, _, _ = call(
        capsys, "trace", "qwen3-tiny", "--tokens", "1,2,3", "--backend", "reference", "-o", trace
    )
    assert code == 0
    code, out, _ = call(capsys, "inspect", trace)
    assert code == 0
    assert "qwen3: 2 layers" in out
    pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    assert call(capsys, "export", source, "--format", "gguf", "-o", tmp_path / "m.gguf")[0] == 0
    code, out, _ = call(capsys, "inspect", tmp_path / "m.gguf", "--json")
    assert code == 0
    assert json.loads(out)["config"]["family"] == "qwen2"


def test_gguf_without_the_package_says_what_to_install(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, err = call(capsys, "export", source, "--format", "gguf", "-o", tmp_path / "m.gguf")
    assert code == 3
    assert "-m pip install 'gguf>=0.17'" in err
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            "export SRC -o m.gguf",
            "a GGUF file, and a Hugging Face folder would be written there; name a folder",
        ),
        ("export SRC -o m.safetensors", "a safetensors file, and a Hugging Face folder"),
        (
            "export SRC --format gguf -o m.apr",
            "an .apr file, and a GGUF file would be written there; name a file",
        ),
        ("import SRC -o m.bin", "a file of PyTorch, and an .apr file would be written there"),
    ],
)
def test_what_is_written_is_what_its_name_says(
    args: str, words: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *(str(source) if a == "SRC" else a for a in args.split()))
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert words in err
