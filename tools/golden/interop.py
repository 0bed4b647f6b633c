"""What other programs make of the files that apr writes, recorded for the tests.

    python -m venv interop-env && interop-env/bin/pip install . torch transformers gguf sentencepiece
    interop-env/bin/python tools/golden/interop.py [--check] [--llama-cpp DIR]

For each checkpoint of tests/support/interop_cases.py: imported, exported again, loaded by transformers, which must compute the
same logits bit for bit, encode the same ids and render the same chat; and written as GGUF. DIR is a checkout of
llama.cpp: its convert_hf_to_gguf.py must make the same tensors, byte for byte, and the same keys. Where the package
llama_cpp (llama-cpp-python) is installed too, llama.cpp must compute the same logits within float32 rounding.

tests/golden/interop.json holds versions, the sha256 of every exported file, tensors and keys as the converter of llama.cpp
writes them, and the largest differences of logits. Ordinary tests compare apr's files with it and need nothing of the
above. --check makes everything again and compares; exit 1 when anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

import gguf

import interop_cases as cases
from apr import backends
from apr.checkpoints.apr2 import write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from apr.checkpoints.checkpoint import Checkpoint
from apr.checkpoints.exporting import export_gguf, export_hf
from apr.checkpoints.gguf import ROPE_FREQS
from apr.checkpoints.importing import import_model
from apr.checkpoints.registry import open_any
from apr.model.taps import Record
from apr.model.transformer import Model

GOLDEN = ROOT / "tests/golden/interop.json"
CLOSE = 2e-5  # of the largest logit: float32, two programs that add up in other orders
LOSSY = (
    0.1  # of the largest logit: llama.cpp rounds activations to the dtype of the weights, to 8 bits for Q8_0
)
UNSTABLE = ("general.name", "general.", "apr.")  # keys that say where a file is from
OUTTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}
CONVERTER = """
import runpy, sys
sys.path.insert(0, {folder!r})
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "dbrx"  # it knows published tokenizers by hash only
sys.argv = ["convert_hf_to_gguf.py", {source!r}, "--outtype", {outtype!r}, "--outfile", {out!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


def demand(ok: bool, what: str) -> None:
    """Stop unless something that the golden file promises holds."""
    if not ok:
        raise SystemExit(f"interop.py: not true: {what}")


def logits_of(folder: Path, ids: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """What transformers computes, float32 (T, V); weights as `dtype`, products in it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        out: np.ndarray = model(torch.from_numpy(ids)).logits[0].float().numpy()
    return out


def apr_logits(source: Path, ids: np.ndarray) -> np.ndarray:
    """What apr computes on the cpu backend, float32 (T, V)."""
    be, loaded = backends.get("cpu"), open_any(str(source))
    model = Model(loaded.cfg, be, *ids.shape, train=False, loss_rows=ids.size, w=loaded.on(be))
    seen = Record(be)
    model.forward(ids.astype(np.int32), seen)
    model.loss(np.zeros(ids.shape, np.int32), tap=seen)
    return seen.seen["logits"]


def same_tokenizers(a: Path, b: Path, whole: bool) -> None:
    """Ids of texts, the chat and where generation ends. whole: also everything else of the generation config."""
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        s, t = (kind.from_pretrained(x) for x in (a, b))
        for text in [*cases.TEXT, "<|im_start|>user\nHi<|im_end|>"]:
            demand(s(text).input_ids == t(text).input_ids, f"{b}: same ids of {text[:20]!r}")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "12?"}]
    if whole:
        demand(
            s.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            == t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
            f"{b}: same chat",
        )
        g, h = (transformers.GenerationConfig.from_pretrained(x) for x in (a, b))
        demand(g.to_dict() == h.to_dict(), f"{b}: same generation config")
    demand(s.eos_token_id == t.eos_token_id, f"{b}: same end of text")


def largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max())


def files_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def contents(path: Path) -> dict[str, Any]:
    """Tensors as [type, shape, sha256] and keys of a GGUF file; long arrays as their hash."""
    reader = gguf.GGUFReader(path)
    keys = {}
    for name, f in reader.fields.items():
        if not name.startswith(("GGUF.", *UNSTABLE)) or name in ("general.architecture", "general.file_type"):
            value = f.contents()
            if isinstance(value, list):
                text = json.dumps(value, ensure_ascii=False)
                value = [len(value), hashlib.sha256(text.encode()).hexdigest()]
            keys[name] = value
    tensors = {
        t.name: [t.tensor_type.name, [int(n) for n in t.shape], hashlib.sha256(t.data.tobytes()).hexdigest()]
        for t in reader.tensors
    }
    return {"keys": keys, "tensors": dict(sorted(tensors.items()))}


def convert(llama_cpp: Path, source: Path, out: Path, outtype: str) -> dict[str, Any]:
    """What llama.cpp's own converter makes of a Hugging Face folder."""
    code = CONVERTER.format(
        folder=str(llama_cpp),
        source=str(source),
        out=str(out),
        outtype=outtype,
        script=str(llama_cpp / "convert_hf_to_gguf.py"),
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    demand(done.returncode == 0, f"the converter of llama.cpp reads {source}: {done.stderr[-800:]}")
    return contents(out)


def llama_cpp_logits(path: Path, ids: np.ndarray) -> tuple[np.ndarray, Any] | None:
    """What llama.cpp computes, float32 (T, V), and the open model; None where it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        return None
    model = llama_cpp.Llama(
        str(path),
        n_ctx=64,
        n_batch=64,
        n_threads=1,
        logits_all=True,
        type_k=0,
        type_v=0,
        flash_attn=False,
        verbose=False,
    )
    model.eval(ids[0].tolist())
    return np.array(model.scores[: ids.size]), model


def check_case(name: str, case: cases.Case, tmp: Path, llama_cpp: Path | None) -> dict[str, Any]:
    """Everything that is recorded of a case. Stops where something does not hold."""
    src, apr, out = tmp / "src", tmp / "m.apr", tmp / "hf"
    cases.write(case, src)
    want = logits_of(src, cases.IDS)
    import_model(str(src), apr)
    checkpoint = open_any(str(apr))
    export_hf(checkpoint, out, max_shard_bytes=50_000)
    demand(np.array_equal(logits_of(out, cases.IDS), want), f"{name}: equal logits after import and export")
    demand(
        np.array_equal(logits_of(out, cases.IDS, case.dtype), logits_of(src, cases.IDS, case.dtype)),
        f"{name}: equal logits in {case.dtype}",
    )
    same_tokenizers(src, out, True)
    row: dict[str, Any] = {
        "largest_logit": float(np.abs(want).max()),
        "hf": {"files": files_of(out), "reload_max_abs": 0.0},
    }
    row["hf"]["apr_max_abs"] = largest(apr_logits(apr, cases.IDS), want)
    demand(row["hf"]["apr_max_abs"] <= CLOSE * row["largest_logit"], f"{name}: apr's logits: {row}")
    for dtype in ("float32", "bfloat16", "float16"):
        cast = tmp / f"hf-{dtype}"
        export_hf(checkpoint, cast, dtype)
        demand(
            np.array_equal(logits_of(cast, cases.IDS, dtype), logits_of(src, cases.IDS, dtype)),
            f"{name}: export --dtype {dtype} is transformers' own conversion",
        )
    _trained(name, case, tmp, src, want)
    dtype = "q8_0" if name == "q8" else None
    made = tmp / "m.gguf"
    figures = export_gguf(checkpoint, made, dtype)
    row["gguf"] = contents(made)
    if llama_cpp is not None:
        theirs = convert(llama_cpp, src, tmp / "theirs.gguf", OUTTYPE[dtype or case.dtype])
        _compare_scaling(name, made, tmp / "theirs.gguf")
        row["gguf"]["tensors"].pop(ROPE_FREQS, None)  # float64, where the converter computes in float32
        theirs["tensors"].pop(ROPE_FREQS, None)
        demand(theirs["tensors"] == row["gguf"]["tensors"], f"{name}: the tensors of llama.cpp's converter")
        for key, value in theirs["keys"].items():
            mine = row["gguf"]["keys"].get(key)
            expected = figures["context_length"] if key.endswith(".context_length") else value
            demand(mine == expected, f"{name}: key {key} is {value!r}, not {mine!r}")
        row["gguf"]["converter_keys"] = sorted(theirs["keys"])
    _llama_cpp(name, checkpoint, row, want, tmp, dtype, figures["context_length"])
    return row


def _llama_cpp(
    name: str,
    checkpoint: Checkpoint,
    row: dict[str, Any],
    want: np.ndarray,
    tmp: Path,
    dtype: str | None,
    positions: int,
) -> None:
    """Logits and ids of llama.cpp, from the file as stored and from one whose matrices are float32, where it rounds nothing."""
    ids = cases.IDS[:, :positions]
    export_gguf(checkpoint, tmp / "wide.gguf", "float32")
    for key, path, part, of in (
        ("llama_cpp_max_abs", tmp / "wide.gguf", CLOSE, "float32"),
        ("llama_cpp_stored_max_abs", tmp / "m.gguf", LOSSY, dtype or "stored"),
    ):
        found = llama_cpp_logits(path, ids)
        if found is None:
            return
        off = row["gguf"][key] = largest(found[0], want[: ids.size])
        demand(
            off <= part * row["largest_logit"],
            f"{name}, {of}: llama.cpp's logits: {off} of {row['largest_logit']}",
        )
        # Not AutoTokenizer: for model_type qwen2 it takes a tokenizer of its own, whatever tokenizer.json says.
        tok = transformers.PreTrainedTokenizerFast.from_pretrained(tmp / "src")
        for text in [*cases.TEXT, "<|im_start|>user\nHi<|im_end|>"]:
            mine = found[1].tokenize(text.encode(), add_bos=True, special=True)
            demand(mine == tok(text).input_ids, f"{name}: llama.cpp's ids of {text[:20]!r}")


def _compare_scaling(name: str, ours: Path, theirs: Path) -> None:
    """Divisors of the rotary frequencies, where there are any."""
    found = [[t.data for t in gguf.GGUFReader(p).tensors if t.name == ROPE_FREQS] for p in (ours, theirs)]
    demand(len(found[0]) == len(found[1]), f"{name}: {ROPE_FREQS} in both files")
    if found[0]:
        demand(bool(np.allclose(found[0][0], found[1][0], rtol=1e-6, atol=0)), f"{name}: {found}")
        demand(
            len(set(np.round(found[0][0], 3).tolist())) > 2,
            f"{name}: frequencies of all ranges: {found[0][0]}",
        )


def _trained(name: str, case: cases.Case, tmp: Path, src: Path, want: np.ndarray) -> None:
    """A checkpoint as `apr pretrain` writes it, of which no Hugging Face file is left."""
    meta = config_to_metadata(case.cfg)
    tok = cases.tokenizer(tmp / "again")
    embed_tokenizer(meta, tok.json, json.loads(tok.json)["added_tokens"][-1]["id"])
    write_apr(tmp / "trained.apr", meta, cases.weights(case), case.dtype)
    export_hf(open_any(str(tmp / "trained.apr")), tmp / "trained")
    demand(
        np.array_equal(logits_of(tmp / "trained", cases.IDS), want), f"{name}: a trained checkpoint, exported"
    )
    same_tokenizers(src, tmp / "trained", False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp / "trained")
    demand(
        model.generation_config.eos_token_id == tok.vocab_size - 1, f"{name}: generation ends where it should"
    )


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the golden file instead of writing it"
    )
    parser.add_argument("--llama-cpp", type=Path, help="a checkout of llama.cpp")
    parser.add_argument("--case", help="only this one, nothing is written")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    golden: dict[str, Any] = {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gguf": _version("gguf"),
            "llama_cpp": _llama_cpp_version(),
            "python": platform.python_version(),
        },
        "cases": {},
    }
    for name, case in cases.CASES.items():
        if args.case in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                row = check_case(name, case, Path(folder), args.llama_cpp)
            golden["cases"][name] = row
            print(
                f"{name:14} largest logit {row['largest_logit']:.2f}: reload 0, apr {row['hf']['apr_max_abs']:.2e}, "
                f"llama.cpp {row['gguf'].get('llama_cpp_max_abs', float('nan')):.2e}"
            )
    if args.case:
        return 0
    if args.check:
        return _compare(json.loads(GOLDEN.read_text()), golden)
    demand(
        "converter_keys" in golden["cases"]["llama"]["gguf"],
        "--llama-cpp is given: the golden file has its keys",
    )
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {GOLDEN}")
    return 0


def _llama_cpp_version() -> str:
    try:
        import llama_cpp
    except ImportError:
        return "none"
    return f"llama-cpp-python {llama_cpp.__version__}"


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _compare(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Exit code: files, tensors and keys exactly; differences of logits are judged when they are made."""
    wrong = 0
    for name, row in new["cases"].items():
        for part in ("hf", "gguf"):
            for key in ("files", "tensors", "keys"):
                if row[part].get(key) != old["cases"].get(name, {}).get(part, {}).get(key):
                    print(f"{name}: {part} {key} differ from {GOLDEN.name}")
                    wrong = 1
    print("differs" if wrong else "the same")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
