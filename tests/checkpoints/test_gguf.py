"""GGUF files: what llama.cpp's own converter writes, byte for byte; read back and mapped back; what cannot be written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import interop_cases
import tokenizer_cases
from apr import backends
from apr.checkpoints import gguf, gguf_reader
from apr.checkpoints.checkpoint import fill
from apr.checkpoints.exporting import export_gguf
from apr.checkpoints.gguf_reader import read_gguf
from apr.checkpoints.gguf_vocab import is_qwen2, tokenizer_json, vocabulary_keys
from apr.checkpoints.hf import read_hf, write_hf
from apr.checkpoints.other_readers import compare_gguf
from apr.checkpoints.registry import open_any, validate
from apr.cli.main import main
from apr.common.errors import InputNotFound, IOFailure, MalformedFile, Refused
from apr.model.config import ModelConfig
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.rope import rope_tables
from apr.model.rope_scaling import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling
from apr.model.transformer import Model
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import train_tokenizer

package = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/interop.json").read_text())["cases"]
OWN = ("apr.", "general.name", "general.quantization_version")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    for name, case in interop_cases.CASES.items():
        interop_cases.write(case, folder / name)
    return folder


def contents(path: Path) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Tensors as [type, shape, sha256], and keys, by the package's own reader."""
    reader = package.GGUFReader(path)
    tensors = {
        t.name: [t.tensor_type.name, [int(n) for n in t.shape], hashlib.sha256(t.data.tobytes()).hexdigest()]
        for t in reader.tensors
    }
    return tensors, {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}


@pytest.mark.parametrize("name", interop_cases.CASES)
def test_tensors_and_keys_are_those_of_the_converter_of_llama_cpp(
    name: str, sources: Path, tmp_path: Path
) -> None:
    """tools/golden/interop.py compared them with convert_hf_to_gguf.py, and had llama.cpp compute with them."""
    want = GOLDEN[name]["gguf"]
    export_gguf(open_any(str(sources / name)), tmp_path / "m.gguf", "q8_0" if name == "q8" else None)
    tensors, keys = contents(tmp_path / "m.gguf")
    scaling = tensors.pop(gguf.ROPE_FREQS, None)
    assert tensors == want["tensors"]
    assert (scaling is not None) == (name == "llama3")
    for key in want["converter_keys"]:
        value = keys[key]
        if isinstance(value, list):
            value = [len(value), hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()]
        assert value == want["keys"][key], key
    assert want["llama_cpp_max_abs"] < 2e-5 * GOLDEN[name]["largest_logit"]


@pytest.mark.parametrize("name", interop_cases.CASES)
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16", "q8_0"])
def test_read_back_and_mapped_back(name: str, dtype: str | None, sources: Path, tmp_path: Path) -> None:
    checkpoint = open_any(str(sources / name))
    export_gguf(checkpoint, tmp_path / "m.gguf", dtype)
    file = read_gguf(tmp_path / "m.gguf")
    assert file.cfg == checkpoint.cfg
    hf = read_hf(sources / name).tensors
    assert set(file.tensors) - {gguf.ROPE_FREQS} == set(hf)
    for n, x in hf.items():
        got = file.tensors[n]
        assert got.shape == x.shape
        kind = file.kinds[n]
        if x.ndim == 1:
            assert kind == "F32"
        elif dtype == "q8_0":
            assert kind == ("Q8_0" if x.shape[-1] % 32 == 0 else "F16")
        if kind == "Q8_0":
            blocks = x.astype(np.float32).reshape(-1, 32)
            step = np.abs(blocks).max(1, keepdims=True) / 127
            # Half a step, and the rounding of the scale to float16, at most 127 times 2^-11 of a step.
            assert (np.abs(got.reshape(-1, 32) - blocks) <= 0.57 * step).all()
        else:
            want = x.astype(got.dtype)
            assert got.tobytes() == want.tobytes(), n
            if dtype is None and x.ndim > 1:
                assert got.dtype == x.dtype


def test_q_and_k_are_turned_for_llama_only(sources: Path, tmp_path: Path) -> None:
    """Row d of a head's first half and row d of its second become neighbours 2d and 2d + 1."""
    for name, turned in (("llama", True), ("mistral", True), ("qwen2", False), ("qwen3", False)):
        checkpoint = open_any(str(sources / name))
        export_gguf(checkpoint, tmp_path / f"{name}.gguf")
        raw = {t.name: t.data for t in package.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        cfg = checkpoint.cfg
        for ours, theirs, heads in (
            ("q_proj", "attn_q", cfg.num_heads),
            ("k_proj", "attn_k", cfg.num_kv_heads),
        ):
            x = np.asarray(checkpoint.tensors[f"model.layers.1.self_attn.{ours}.weight"])
            y = raw[f"blk.1.{theirs}.weight"].view(x.dtype).reshape(x.shape)
            want = x.copy()
            if turned:
                half = cfg.head_dim // 2
                for h in range(heads):
                    for d in range(half):
                        want[h * cfg.head_dim + 2 * d] = x[h * cfg.head_dim + d]
                        want[h * cfg.head_dim + 2 * d + 1] = x[h * cfg.head_dim + half + d]
            assert y.tobytes() == want.tobytes()
        assert "blk.0.attn_q.bias" in raw or not cfg.qkv_bias
        assert ("blk.0.attn_q_norm.weight" in raw) == cfg.qk_norm


def test_divisors_that_writer_and_reader_share(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gguf.frequency_divisors

    def upside_down(cfg: ModelConfig) -> Any:
        found = right(cfg)
        return None if found is None else (1 / found).astype(np.float32)

    for module in (gguf, gguf_reader):
        monkeypatch.setattr(module, "frequency_divisors", upside_down)
    with pytest.raises(IOFailure, match="rope_freqs"):
        export_gguf(open_any(str(sources / "llama3")), tmp_path / "m.gguf")


def test_divisors_of_scaled_frequencies(sources: Path, tmp_path: Path) -> None:
    """llama.cpp turns by position * theta^(-2i/D) / divisor: the very angles of apr's tables, in all three ranges."""
    checkpoint = open_any(str(sources / "llama3"))
    export_gguf(checkpoint, tmp_path / "m.gguf")
    (divisors,) = (
        t.data for t in package.GGUFReader(tmp_path / "m.gguf").tensors if t.name == gguf.ROPE_FREQS
    )
    cfg = checkpoint.cfg
    assert divisors.dtype == np.float32
    assert divisors.min() == 1
    assert divisors.max() == cfg.rope_scaling.factor  # type: ignore[union-attr]
    assert ((divisors > 1) & (divisors < divisors.max())).any()
    angle = np.outer(
        np.arange(40), cfg.rope_theta ** (-np.arange(0, cfg.head_dim, 2) / cfg.head_dim) / divisors
    )
    cos, sin = rope_tables(cfg, 40)
    assert np.abs(np.cos(angle) - cos).max() < 1e-5
    assert np.abs(np.sin(angle) - sin).max() < 1e-5


def test_logits_from_a_file_that_was_read_back(sources: Path, tmp_path: Path) -> None:
    """Through GGUF and back: the same logits, bit for bit."""
    be = backends.get("cpu")
    for name in ("llama3", "mistral", "qwen2", "qwen3-untied"):
        loaded = open_any(str(sources / name))
        export_gguf(open_any(str(sources / name)), tmp_path / f"{name}.gguf")
        file = read_gguf(tmp_path / f"{name}.gguf")
        seen = []
        for cfg, tensors in ((loaded.cfg, loaded.tensors), (file.cfg, file.tensors)):
            layout = Layout(cfg)
            host = np.zeros(layout.size, np.float32)
            for hf, view in layout.named(host).items():
                view[...] = tensors[hf]
            w = be.empty(host.size, "float32")
            be.from_host(w, host)
            model = Model(cfg, be, 1, 9, train=False, w=w)
            model.forward(interop_cases.IDS[:, :9].astype(np.int32))
            seen.append(model.last_logits().copy())
        assert seen[0].tobytes() == seen[1].tobytes()


@pytest.mark.parametrize("name", ["my-phi3-clone", "Phi-3 mini", "modern-bert", "plain"])
def test_names_by_which_llama_cpp_changes_tokens(name: str, sources: Path, tmp_path: Path) -> None:
    """It took spaces beside special tokens of such a model, or ended: "error loading model vocabulary: unordered_map::at"."""
    (tmp_path / name).symlink_to(sources / "llama")
    export_gguf(open_any(str(tmp_path / name)), tmp_path / "m.gguf")
    assert contents(tmp_path / "m.gguf")[1]["general.name"] == ("plain" if name == "plain" else "llama")


def test_a_window_limits_the_positions(sources: Path, tmp_path: Path) -> None:
    """llama.cpp's llama has no window: within as many positions as it has the two compute the same."""
    done = export_gguf(open_any(str(sources / "mistral")), tmp_path / "m.gguf")
    assert done["context_length"] == 5
    assert contents(tmp_path / "m.gguf")[1]["llama.context_length"] == 5


def test_a_bit_that_changes_while_it_is_written_is_seen(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_any(str(sources / "llama"))
    real = gguf.to_adjacent
    monkeypatch.setattr(gguf, "to_adjacent", lambda x, heads: x)  # the classic: rows not reordered
    with pytest.raises(IOFailure, match="q_proj"):
        export_gguf(checkpoint, tmp_path / "a.gguf")
    monkeypatch.setattr(gguf, "to_adjacent", real)
    quantize = package.quants.quantize

    def spoil(x: np.ndarray, kind: Any) -> Any:
        out = quantize(x, kind)
        out[-1, -1] ^= 64
        return out

    monkeypatch.setattr(package.quants, "quantize", spoil)
    with pytest.raises(IOFailure, match="differs from the checkpoint"):
        export_gguf(open_any(str(sources / "q8")), tmp_path / "b.gguf", "q8_0")


# --- tokenizers


def test_tokens_types_and_padding(sources: Path, tmp_path: Path) -> None:
    export_gguf(open_any(str(sources / "llama")), tmp_path / "m.gguf")
    keys = contents(tmp_path / "m.gguf")[1]
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == interop_cases.VOCAB
    fields = json.loads((sources / "llama/tokenizer.json").read_text())
    n = len(fields["model"]["vocab"]) + 3
    assert tokens[n:] == [f"[PAD{i}]" for i in range(n, interop_cases.VOCAB)]
    assert set(kinds[n:]) == {5}
    assert set(kinds[: n - 3]) == {1}
    assert (tokens[n - 3 : n], kinds[n - 3 : n]) == (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        [3, 3, 3],
    )
    assert tokens[keys["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert keys["tokenizer.ggml.merges"] == [" ".join(m) for m in fields["model"]["merges"]]
    assert keys["tokenizer.chat_template"] == interop_cases.TEMPLATE
    assert keys["tokenizer.ggml.add_bos_token"] is False


def change(text: str, **steps: Any) -> str:
    d = json.loads(text)
    for key, value in steps.items():
        place = d["model"] if key in ("ignore_merges",) else d
        place[key] = value
    return json.dumps(d)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def test_rules_that_have_a_name_in_llama_cpp(sources: Path) -> None:
    text = (sources / "llama/tokenizer.json").read_text()
    split = json.loads(text)["pre_tokenizer"]["pretokenizers"][0]
    single = {**split, "pattern": {"Regex": split["pattern"]["Regex"].replace("{1,3}", "")}}
    plain = {**BYTES, "use_regex": False}
    digits = {"type": "Digits", "individual_digits": True}

    def sequence(*steps: Any) -> dict[str, Any]:
        return {"type": "Sequence", "pretokenizers": list(steps)}

    for name, changed in (
        ("dbrx", text),  # Llama 3's rule without its way with whole words
        ("llama-bpe", change(text, ignore_merges=True)),
        ("qwen2", change(text, pre_tokenizer=sequence(single, plain), normalizer={"type": "NFC"})),
        ("gpt-2", change(text, pre_tokenizer=BYTES)),
        ("smollm", change(text, pre_tokenizer=sequence(digits, BYTES))),
    ):
        keys = vocabulary_keys(changed, "t", interop_cases.VOCAB, None)
        assert keys["tokenizer.ggml.pre"] == name
        assert is_qwen2(changed) is (name == "qwen2")
    for wrong in (
        {"pre_tokenizer": {**BYTES, "add_prefix_space": True}},
        {"pre_tokenizer": sequence({**split, "pattern": {"Regex": "\\w+|\\W"}}, plain)},
        {"pre_tokenizer": sequence({**digits, "individual_digits": False}, BYTES)},
        {"normalizer": {"type": "NFKC"}},
    ):
        with pytest.raises(Refused, match=r"llama\.cpp"):
            vocabulary_keys(change(text, **wrong), "t", interop_cases.VOCAB, None)


def test_no_end_of_text_is_refused(sources: Path) -> None:
    text = (sources / "llama/tokenizer.json").read_text()
    with pytest.raises(Refused, match="end of text"):
        vocabulary_keys(change(text, added_tokens=[]), "t", interop_cases.VOCAB, None)


def test_sentencepiece_scores_follow_the_merges(data: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp merges by score: tools/golden/interop.py's llama.cpp gives all of TinyStories the library's ids."""
    source = data("stories260K/hf")
    export_gguf(open_any(str(source)), tmp_path / "m.gguf")
    keys = contents(tmp_path / "m.gguf")[1]
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    assert keys["tokenizer.ggml.add_bos_token"] is True
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    merges = json.loads((source / "tokenizer.json").read_text())["model"]["merges"]
    made = ["".join(m.split(" ") if isinstance(m, str) else m) for m in merges]
    ranks = [scores[tokens.index(t)] for t in dict.fromkeys(made)]
    assert ranks == sorted(ranks, reverse=True)
    kinds = keys["tokenizer.ggml.token_type"]
    assert [kinds[tokens.index(t)] for t in ("<unk>", "<s>", "</s>", "<0x0A>")] == [2, 3, 3, 6]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)


def test_sentencepiece_without_byte_pieces_is_refused() -> None:
    """llama.cpp ends its process at the first character that is not in such a vocabulary."""

    def make(kind: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return {**kind(), "added_tokens": [tokenizer_cases.added(0, "<unk>")]}

    whole = make(tokenizer_cases.fallback)
    whole["model"]["merges"].append("a b")
    size = len(whole["model"]["vocab"])
    assert len(vocabulary_keys(json.dumps(whole), "t", size, 0)["tokenizer.ggml.tokens"]) == size
    one = make(tokenizer_cases.fallback)
    del one["model"]["vocab"]["<0x0A>"]
    for missing, broken in ((1, one), (256, make(tokenizer_cases.without_bytes))):
        for fallback in (False,) if missing == 1 else (False, True):
            broken["model"]["byte_fallback"] = fallback
            with pytest.raises(Refused, match=rf"^t: {missing} of the byte pieces .*llama\.cpp would abort"):
                vocabulary_keys(json.dumps(broken), "t", size, 0)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    cfg = PRESETS["llama-tiny"]
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 1)
    write_hf(tmp_path / "src", cfg, layout.named(host))
    assert export_gguf(open_any(str(tmp_path / "src")), tmp_path / "m.gguf")["tokenizer"] is None
    keys = contents(tmp_path / "m.gguf")[1]
    assert keys["tokenizer.ggml.model"] == "none"
    assert keys["llama.vocab_size"] == cfg.vocab_size


LAYERS = {  # models whose layers or norms differ from Llama's, as llama.cpp computes them
    "olmo2": dataclasses.replace(PRESETS["olmo2-tiny"], head_dim=10),
    "smollm3": dataclasses.replace(
        PRESETS["smollm3-tiny"], num_layers=5, no_rope_layers=(3,), sliding_window=0, full_attention_layers=()
    ),
    "smollm3-window": dataclasses.replace(
        PRESETS["smollm3-tiny"], num_layers=5, no_rope_layers=(3,), full_attention_layers=(0, 1, 2, 4)
    ),
    "qwen2-window": dataclasses.replace(PRESETS["qwen2-tiny"], sliding_window=6, full_attention_layers=(0,)),
}


@pytest.mark.parametrize("cfg", LAYERS.values(), ids=LAYERS)
def test_layers_of_other_parts_come_back(cfg: ModelConfig, tmp_path: Path) -> None:
    """Names are those of the package gguf for the architecture; q and k of an architecture that turns neighbours move."""
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 1)
    weights = layout.named(host)
    gguf.write_gguf(tmp_path / "m.gguf", cfg, weights)
    tensors, keys = contents(tmp_path / "m.gguf")
    arch = {name: a for a, name in package.MODEL_ARCH_NAMES.items()}[keys["general.architecture"]]
    names = package.get_tensor_name_map(arch, cfg.num_layers)
    assert set(tensors) == {names.get_name(hf, (".weight", ".bias")) for hf in weights}
    assert keys[f"{cfg.family}.context_length"] == (cfg.sliding_window or cfg.max_position_embeddings)
    file = read_gguf(tmp_path / "m.gguf")
    assert file.cfg == cfg
    for hf, want in weights.items():
        assert np.array_equal(file.tensors[hf], want), hf


# --- what is refused


def test_a_family_that_llama_cpp_has_no_name_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(gguf.ARCHITECTURE, "llama")
    with pytest.raises(Refused, match=r"no architecture of llama\.cpp is known for llama models"):
        gguf.write_gguf(tmp_path / "m.gguf", PRESETS["llama-tiny"], {})
    assert not list(tmp_path.iterdir())


def test_layers_that_llama_cpp_would_turn(tmp_path: Path) -> None:
    cfg = PRESETS["smollm3-tiny"]
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    with pytest.raises(
        Refused, match=r"layers \[1\] have no rotary embedding; llama.cpp leaves it out of layers \[\]"
    ):
        gguf.write_gguf(tmp_path / "m.gguf", cfg, layout.named(host))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["max_position_embeddings", "original_max_position_embeddings"])
def test_lengths_that_no_key_holds(key: str, tmp_path: Path) -> None:
    def model(positions: int) -> ModelConfig:
        if key == "max_position_embeddings":
            return dataclasses.replace(PRESETS["llama-tiny"], max_position_embeddings=positions)
        return dataclasses.replace(PRESETS["llama-tiny"], rope_scaling=YarnScaling(4.0, positions))

    weights = Layout(model(64)).named(np.ones(Layout(model(64)).size, np.float32))
    most = (1 << 32) - 1
    gguf.write_gguf(tmp_path / "m.gguf", model(most), weights)
    assert read_gguf(tmp_path / "m.gguf").cfg == model(most)
    with pytest.raises(Refused, match=f"{key} = {most + 1}: a GGUF file holds less than {most + 1}"):
        gguf.write_gguf(tmp_path / "m.gguf", model(most + 1), weights)


@pytest.mark.parametrize("preset", ["qwen2-tiny", "smollm3"])
def test_scaling_that_llama_cpp_would_not_honour(preset: str, tmp_path: Path) -> None:
    """smollm3 turns neighbours as llama does, and its loader ends at a file with rope_freqs.weight."""
    plain = LAYERS.get(preset) or PRESETS[preset]
    cfg = dataclasses.replace(plain, rope_scaling=PRESETS["llama3-tiny"].rope_scaling)
    with pytest.raises(Refused, match="does not scale"):
        written(tmp_path / "m.gguf", cfg)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("olmo2", {}, r"num_heads \* head_dim = 48, hidden_size = 40"),
        ("olmo2", {"head_dim": 10, "tie_word_embeddings": True}, "tie_word_embeddings = true"),
        ("qwen2", {"head_dim": 16}, r"num_heads \* head_dim = 112, hidden_size = 56"),
    ],
)
def test_models_whose_file_llama_cpp_does_not_open(
    family: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Its loader asks for tensors of other shapes (check_tensor_dims), or for output.weight, and gives up."""
    with pytest.raises(Refused, match=words):
        written(tmp_path / "m.gguf", dataclasses.replace(PRESETS[f"{family}-tiny"], **change))
    assert not list(tmp_path.iterdir())


def test_turns_of_yarn_that_llama_cpp_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loader passes over yarn_beta_fast and yarn_beta_slow of all architectures of ours: logits were off by their size."""
    scaling = YarnScaling(3.0, 64, 3.0, 0.7, mscale=0.707, mscale_all_dim=1.2)
    cfg = dataclasses.replace(PRESETS["llama-tiny"], rope_theta=100.0, rope_scaling=scaling)
    with pytest.raises(
        Refused, match=r"beta_fast = 3 and beta_slow = 0\.7, of which llama\.cpp takes 32 and 1"
    ):
        written(tmp_path / "m.gguf", cfg)
    monkeypatch.setattr(gguf, "check_scaling", lambda *_: None)
    tensors = written(tmp_path / "m.gguf", cfg)
    with pytest.raises(Refused, match="takes 32 and 1"):
        open_any(str(tmp_path / "m.gguf"))
    with pytest.raises(IOFailure, match=r"llama\.rope\.scaling"):
        compare_gguf(tmp_path / "m.gguf", cfg, tensors)


@pytest.mark.parametrize("value", [7e4, 3e38])
def test_values_that_do_not_fit(value: float, sources: Path, tmp_path: Path) -> None:
    cfg = interop_cases.CASES["q8"].cfg
    tensors = interop_cases.weights(interop_cases.CASES["q8"])
    tensors["model.embed_tokens.weight"][0, 0] = value
    dtype = "float16" if value < 1e6 else "q8_0"
    with pytest.raises(Refused, match=r"embed_tokens"):
        gguf.write_gguf(tmp_path / "m.gguf", cfg, tensors, dtype)
    assert not list(tmp_path.iterdir())


def test_nothing_that_exists_is_overwritten(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("mine")
    checkpoint = open_any(str(sources / "llama"))
    with pytest.raises(Refused, match="--force"):
        export_gguf(checkpoint, out)
    assert out.read_text() == "mine"
    export_gguf(checkpoint, out, force=True)
    assert read_gguf(out).cfg == checkpoint.cfg
    with pytest.raises(Refused, match="is a folder"):
        export_gguf(checkpoint, tmp_path, force=True)


def test_files_that_are_no_gguf(sources: Path, tmp_path: Path) -> None:
    export_gguf(open_any(str(sources / "qwen3")), tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for content in (b"", b"GGUF", raw[:100], raw[: len(raw) // 3], raw[:-1000], b"GGML" + raw[4:]):
        bad.write_bytes(content)
        with pytest.raises(MalformedFile, match=r"bad\.gguf"):
            read_gguf(bad)
    bad.write_bytes(raw.replace(b"qwen3", b"gemma"))
    with pytest.raises(Refused, match="gemma"):
        read_gguf(bad)
    with pytest.raises(InputNotFound):
        read_gguf(tmp_path / "none.gguf")


def test_command(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.gguf"
    assert main(["export", str(sources / "q8"), "--format", "gguf", "--dtype", "q8_0", "-o", str(out)]) == 0
    assert "Q8_0" in capsys.readouterr().out
    assert main(["export", str(sources / "q8"), "--format", "gguf", "-o", str(out)]) == 5
    assert "--force" in capsys.readouterr().err
    assert main(["export", str(sources / "q8"), "--format", "gguf", "-o", str(out), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["types"] == {"F32": 20}


# --- read as a checkpoint


@pytest.fixture(scope="module")
def files(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """name.dtype.gguf of every case."""
    folder = tmp_path_factory.mktemp("files")
    for name in interop_cases.CASES:
        for dtype in gguf.TYPES:
            export_gguf(open_any(str(sources / name)), folder / f"{name}.{dtype}.gguf", dtype)
    return folder


@pytest.mark.parametrize("name", interop_cases.CASES)
def test_a_checkpoint_like_any_other(name: str, sources: Path, files: Path) -> None:
    """float32 bit for bit; narrower types the values that they hold; the same ids for the same text."""
    want = open_any(str(sources / name))
    layout = Layout(want.cfg)
    host = np.zeros(layout.size, np.float32)
    fill(layout, host, want)
    for dtype in gguf.TYPES:
        path = str(files / f"{name}.{dtype}.gguf")
        got = open_any(path)
        assert (got.kind, got.cfg) == ("gguf", want.cfg)
        back = np.zeros(layout.size, np.float32)
        fill(layout, back, got)
        if dtype == "float32":
            assert back.tobytes() == host.tobytes()
            assert got.sha256 == want.sha256
        for t in package.GGUFReader(path).tensors:  # the package's own reader, values as it dequantizes them
            slot = next((s for s in layout.in_order() if gguf.tensor_name(s) == t.name), None)
            if slot is None:
                assert t.name == gguf.ROPE_FREQS
                continue
            data = package.quants.dequantize(t.data, t.tensor_type).reshape(slot.shape)
            if heads := gguf.turned_heads(want.cfg, slot):
                data = gguf.to_halves(data, heads)
            mine = back[slot.offset : slot.offset + slot.size].reshape(slot.shape)
            assert mine.tobytes() == np.ascontiguousarray(data, np.float32).tobytes(), (dtype, t.name)
        a, b = want.tokenizer, got.tokenizer
        assert a
        assert b
        assert (b.eos_token, b.eos_id) == (a.eos_token, a.eos_id)
        for text in (*interop_cases.TEXT, "<|im_end|> \u00e9 e\u0301\t  x"):
            for special in (False, True):
                assert b.encode(text, special).tolist() == a.encode(text, special).tolist()
            assert b.encode_marked(text).tolist() == a.encode_marked(text).tolist()
            assert b.decode(a.encode(text)) == text
        assert got.chat_template == interop_cases.TEMPLATE
        assert got.template().render([{"role": "user", "content": "x"}])  # type: ignore[union-attr]


@pytest.mark.parametrize("changes", [
    {"normalizer": {"type": "NFC"}, "qwen": True}, {"ignore_merges": True}, {"pre_tokenizer": BYTES},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}},
    {"post_processor": {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}], "pair": [], "special_tokens": {
            t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (("<|im_start|>", 298), ("<|endoftext|>", 299))}}},
])  # fmt: skip
def test_tokenizers_there_and_back(changes: dict[str, Any], sources: Path) -> None:
    text = (sources / "llama/tokenizer.json").read_text()
    changes = dict(changes)
    if changes.pop("qwen", False):
        split = json.loads(text)["pre_tokenizer"]
        split["pretokenizers"][0]["pattern"]["Regex"] = split["pretokenizers"][0]["pattern"]["Regex"].replace(
            "{1,3}", ""
        )
        changes["pre_tokenizer"] = split
    if "post_processor" in changes:
        ids = {t["content"]: t["id"] for t in json.loads(text)["added_tokens"]}
        for t, row in changes["post_processor"]["special_tokens"].items():
            row["ids"] = [ids[t]]
    a = Tokenizer.from_json(change(text, **changes), "a")
    keys = vocabulary_keys(a.json, "a", interop_cases.VOCAB, a.eos_id)
    made = tokenizer_json(keys, "b")
    assert made is not None
    b = Tokenizer.from_json(made, "b", a.eos_id)
    assert vocabulary_keys(made, "b", interop_cases.VOCAB, a.eos_id) == keys
    for text in (*interop_cases.TEXT, "1234567 don't <|im_end|> \u00e9  \n\n x", ""):
        for special in (False, True):
            assert b.encode(text, special).tolist() == a.encode(text, special).tolist()


def test_a_tokenizer_of_ours_has_its_bytes_again(tmp_path: Path) -> None:
    """Shards name their tokenizer by its SHA-256: a GGUF file of a run must be scored on the shards of that run."""
    ours = train_tokenizer(interop_cases.TEXT, 300, tmp_path / "tok")
    made = tokenizer_json(vocabulary_keys(ours.json, "a", ours.vocab_size, ours.eos_id), "b")
    assert made == ours.json


def test_a_sentencepiece_tokenizer_there_and_back(data: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_any(str(data("stories260K/hf")))
    export_gguf(source, tmp_path / "m.gguf", "float32")
    got = open_any(str(tmp_path / "m.gguf"))
    a, b = source.tokenizer, got.tokenizer
    assert a
    assert b
    assert (b.eos_id, b.vocab_size, got.sha256) == (a.eos_id, a.vocab_size, source.sha256)
    for text in (*interop_cases.TEXT, " two  spaces", "Lily ran. \u4e2d</s>"):
        for special in (False, True):
            assert b.encode(text, special).tolist() == a.encode(text, special).tolist()
        assert b.decode(b.encode(text)) == a.decode(a.encode(text))


def test_tokenizers_that_are_refused_by_name(sources: Path, tmp_path: Path) -> None:
    text = (sources / "llama/tokenizer.json").read_text()
    keys = vocabulary_keys(text, "t", interop_cases.VOCAB, None)
    for change_, match in (
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
    ):
        with pytest.raises(Refused, match=match):
            tokenizer_json({**keys, **change_}, "t")
    for name, wrong in (
        ("tokens", ["a", "a"]),
        ("merges", [1]),
        ("token_type", [1]),
        ("bos_token_id", 10**6),
    ):
        with pytest.raises(MalformedFile):
            tokenizer_json({**keys, f"tokenizer.ggml.{name}": wrong}, "t")
    assert tokenizer_json({"tokenizer.ggml.model": "none"}, "t") is None


def test_keys_that_would_not_be_honoured(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gguf._model_keys

    def more(writer: Any, *rest: Any) -> None:
        real(writer, *rest)
        writer.add_string("llama.rope.scaling.type", "longrope")

    monkeypatch.setattr(gguf, "_model_keys", more)
    export_gguf(open_any(str(sources / "llama")), tmp_path / "m.gguf")
    with pytest.raises(Refused, match=r"rope\.scaling\.type = 'longrope'"):
        open_any(str(tmp_path / "m.gguf"))


SCALED = {
    "linear": LinearScaling(4.0),
    "dynamic": DynamicScaling(2.0),
    "yarn": YarnScaling(4.0, 16),
    "yarn of other values": YarnScaling(3.0, 28, mscale=0.707, mscale_all_dim=1.2),
    "yarn of other turns, the same pairs": YarnScaling(3.0, 28, 30.0, 0.98),
    "yarn with its factor": YarnScaling(3.0, 28, attention_factor=1.3),
}


def written(path: Path, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Write a GGUF file with random weights of a configuration; returns these."""
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 1, std=0.2)
    gguf.write_gguf(path, cfg, layout.named(host))
    return layout.named(host)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", SCALED)
def test_scalings_that_are_keys(name: str, family: str, tmp_path: Path) -> None:
    """Written, read by other code with llama.cpp's formula, read back the same; and without what apr alone writes."""
    cfg = dataclasses.replace(PRESETS[f"{family}-tiny"], rope_theta=100.0, rope_scaling=SCALED[name])
    path = tmp_path / "m.gguf"
    compare_gguf(path, cfg, written(path, cfg))
    assert open_any(str(path)).cfg == cfg
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package.GGUFWriter, "add_float64", lambda *_: None)
        patch.setattr(package.GGUFWriter, "add_string", without_ours(package.GGUFWriter.add_string))
        written(path, cfg)
    theirs = open_any(str(path)).cfg
    assert type(theirs.rope_scaling) is (type(None) if name == "dynamic" else type(cfg.rope_scaling))
    for got, want in zip(rope_tables(theirs, 64), rope_tables(cfg, 64), strict=True):
        assert np.abs(got - want).max() < 1e-5


def without_ours(real: Any) -> Any:
    return lambda writer, key, value: None if key.startswith("apr.rope_scaling") else real(writer, key, value)


def test_keys_of_a_scaling_that_another_tool_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's converter writes type, factor and length, and no bounds; a factor alone divides positions."""
    cfg, path = dataclasses.replace(PRESETS["qwen2-tiny"], rope_theta=100.0), tmp_path / "m.gguf"

    def read(**keys: Any) -> Any:
        named = {f"rope.scaling.{key}": value for key, value in keys.items()}
        monkeypatch.setattr(gguf, "scaling_keys", lambda cfg: named)
        written(path, cfg)
        return open_any(str(path)).cfg.rope_scaling

    assert read(type="yarn", factor=4.0, original_context_length=32) == YarnScaling(4.0, 32)
    assert read(type="yarn", factor=4.0) == YarnScaling(4.0, 64)
    assert read(type="linear", factor=2.0) == read(factor=2.0) == LinearScaling(2.0)
    assert read(type="none") is None
    for keys, error, words in (
        (
            {"type": "yarn"},
            MalformedFile,
            r"qwen2\.rope\.scaling\.type = 'yarn' needs a rope\.scaling\.factor",
        ),
        ({"type": "yarn", "factor": "4"}, MalformedFile, "factor = '4'"),
        ({"type": "yarn", "factor": 4.0, "attn_factor": "1"}, MalformedFile, "attention_factor = '1'"),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 1}, Refused, "less than a turn"),
        ({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1}, Refused, "yarn_log_multiplier = 0.1"),
        ({"type": "none", "factor": 4.0}, Refused, r"rope\.scaling\.factor = 4"),
    ):
        with pytest.raises(error, match=words):
            read(**keys)


@pytest.mark.parametrize("key", ["factor", "attn_factor", "original_context_length"])
def test_a_key_that_llama_cpp_would_turn_by_otherwise(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = dataclasses.replace(
        PRESETS["llama-tiny"], rope_theta=100.0, rope_scaling=SCALED["yarn of other values"]
    )
    right = gguf.scaling_keys(cfg)
    wrong = {**right, f"rope.scaling.{key}": right[f"rope.scaling.{key}"] * 2}
    monkeypatch.setattr(gguf, "scaling_keys", lambda cfg: wrong)
    tensors = written(tmp_path / "m.gguf", cfg)
    with pytest.raises(IOFailure, match=r"llama\.rope\.scaling"):
        compare_gguf(tmp_path / "m.gguf", cfg, tensors)
    with pytest.raises(Refused, match=rf"{key} = .* is not what its apr\.rope_scaling keys say"):
        open_any(str(tmp_path / "m.gguf"))


def test_yarn_without_truncation_is_not_written(tmp_path: Path) -> None:
    cfg = dataclasses.replace(PRESETS["llama-tiny"], rope_scaling=YarnScaling(4.0, 16, truncate=False))
    with pytest.raises(Refused, match=r"truncate = false.*--format hf"):
        written(tmp_path / "m.gguf", cfg)
    assert not list(tmp_path.iterdir())


def test_scaled_frequencies_that_contradict_the_keys(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gguf.frequency_divisors
    monkeypatch.setattr(gguf, "frequency_divisors", lambda cfg: 2 * real(cfg))  # type: ignore[operator]
    with pytest.raises(Refused, match="rope_freqs"):
        export_gguf(open_any(str(sources / "llama3")), tmp_path / "m.gguf")


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])
def test_the_scaling_of_llama_3_is_known_by_its_divisors(
    factor: float, head_dim: int, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's converter writes rope_freqs.weight and no key of what it was made of."""
    scaling = Llama3Scaling(factor, 1.0, 4.0, 8192)
    cfg = dataclasses.replace(
        PRESETS["llama-tiny"],
        rope_scaling=scaling,
        rope_theta=5e5,
        head_dim=head_dim,
        max_position_embeddings=131072,
    )
    monkeypatch.setattr(package.GGUFWriter, "add_float64", lambda *_: None)

    def written(divisors: Any) -> ModelConfig:
        path = tmp_path / "m.gguf"
        monkeypatch.setattr(gguf, "frequency_divisors", lambda cfg: np.asarray(divisors, np.float32))
        layout = Layout(cfg)
        gguf.write_gguf(path, cfg, {s.hf: np.zeros(s.shape, np.float32) for s in layout.slots}, "float32")
        return open_any(str(path)).cfg

    # As its converter computes them, value by value.
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * 5e5 ** (i / head_dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wavelength < 8192 / 4 else factor if wavelength > 8192 else between)
    assert len(set(divisors)) > 3
    assert written(divisors) == cfg
    for other in (np.array(divisors) * 1.01, divisors[::-1], [0.0] * len(divisors), [np.inf] * len(divisors)):
        with pytest.raises(Refused, match="whose factors it does not say"):
            written(other)


def test_types_that_are_not_read(files: Path, tmp_path: Path) -> None:
    raw = (files / "q8.q8_0.gguf").read_bytes()
    name = b"blk.0.attn_q.weight"
    at = raw.index(name) + len(name) + 4 + 16  # dimensions, then the type
    assert raw[at] == 8
    (tmp_path / "m.gguf").write_bytes(raw[:at] + bytes([12]) + raw[at + 1 :])
    with pytest.raises(Refused, match="Q4_K"):
        open_any(str(tmp_path / "m.gguf"))


def test_files_that_hold_something_else(files: Path, tmp_path: Path) -> None:
    raw = (files / "q8.q8_0.gguf").read_bytes()
    (tmp_path / "big.gguf").write_bytes(raw[:4] + raw[4:8][::-1] + raw[8:])
    with pytest.raises(Refused, match="is big endian"):
        open_any(str(tmp_path / "big.gguf"))
    writer = package.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 4), np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    with pytest.raises(Refused, match=r"general\.type = 'adapter'"):
        open_any(str(tmp_path / "lora.gguf"))


def test_commands(files: Path, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What can be compared can be inspected, imported, run, evaluated, traced and looked into."""

    def ask(*args: str) -> dict[str, Any]:
        assert main([*args, "--json"]) == 0, capsys.readouterr()
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    wide, narrow = str(files / "llama.float32.gguf"), str(files / "q8.q8_0.gguf")
    source = str(sources / "llama")
    assert ask("inspect", wide)["weights_sha256"] == ask("inspect", source)["weights_sha256"]
    assert ask("inspect", wide)["facts"]["eos_token_id"] == open_any(source).eos
    assert ask("diff", source, wide)["equal"]
    done = ask("import", narrow, "-o", str(tmp_path / "m.apr"))
    assert (done["dtypes"], done["eos_token"]) == (["float32"], "<|im_end|>")
    assert ask("diff", narrow, str(tmp_path / "m.apr"))["equal"]
    few = ["--max-tokens", "4", "--temperature", "0", "--device", "cpu"]
    assert ask("run", wide, "def", *few)["ids"] == ask("run", source, "def", *few)["ids"]
    (tmp_path / "t.txt").write_text(interop_cases.TEXT[0])
    on = ["--text", str(tmp_path / "t.txt"), "--device", "cpu", "--seq-length", "16"]
    assert ask("eval", wide, *on)["loss"] == ask("eval", source, *on)["loss"]
    traces = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    for model, out in zip((wide, source), traces, strict=True):
        ask("trace", model, "--tokens", "1,2,3", "-o", out, "--device", "cpu")
    assert ask("diff", *traces)["equal"]
    assert ask("validate", narrow)["verdict"] == "PASS"
    assert ask("plan", "--init", wide, "--seq-length", "16")["fits"]
    assert main(["bisect", wide, "--tokens", "1,2,3,4", "--json"]) == 0


def test_validate_says_all_that_is_wrong(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = (files / "llama.float32.gguf").read_bytes()
    path = tmp_path / "m.gguf"

    def red(data: bytes) -> list[str]:
        path.write_bytes(data)
        return [f.name for f in validate(str(path)).findings if f.verdict == "FAIL"]

    assert red(raw) == []
    assert red(raw[:-64]) == ["header"]
    assert red(raw.replace(b"llama.rope.freq_base", b"llama.rope.freq_bose")) == ["config complete"]
    assert red(raw.replace(b"\x04\0\0\0\0\0\0\0dbrx", b"\x04\0\0\0\0\0\0\0dbry")) == ["tokenizer"]
    name = b"blk.1.ffn_gate.weight"
    assert red(raw.replace(name, b"blk.1.ffn_gote.weight")) == ["names"]
    assert red(raw[:-4] + np.float32(np.inf).tobytes()) == ["finite values"]


def test_a_job_that_starts_from_one(files: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / f"texts/{i}.txt").write_text("".join(interop_cases.TEXT[i % 3 :]) * (20 + i))
    job = ["--corpus", str(tmp_path / "texts"), "--val-fraction", "0.3",
           "--bounds", "pretrained_share=9", "--run-dir", str(tmp_path / "run"), "--num-steps", "2",
           "--batch-size", "2", "--seq-length", "16", "--device", "cpu"]  # fmt: skip
    assert main(["pretrain", "--init", str(files / "llama.float32.gguf"), *job]) == 0
    checkpoints = sorted((tmp_path / "run/ckpt").glob("*.apr"))
    assert open_any(str(checkpoints[-1])).cfg == interop_cases.CASES["llama"].cfg


def test_the_folder_of_a_run_is_answered_with_its_checkpoint(tmp_path: Path) -> None:
    """A run has a config.json of its own; so has what lies in ckpt."""
    (tmp_path / "run/ckpt").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text("{}")
    for n in (1, 2):
        (tmp_path / f"run/ckpt/epoch-00{n}.apr").write_bytes(b"")
    for folder in ("run", "run/ckpt"):
        with pytest.raises(InputNotFound, match=r"folder of a run.*ckpt/epoch-002\.apr"):
            open_any(str(tmp_path / folder))
