"""Logits and ids that llama.cpp computes from GGUF files of apr, recorded for the tests.

    python -m venv llama-env && llama-env/bin/pip install . gguf llama-cpp-python
    llama-env/bin/python tools/golden/by_llama_cpp.py [--check]

For each model of tests/support/llama_cpp_cases.py, float32 and with a float32 KV cache: logits of the positions KEPT. For
each tokenizer: the ids of each text, as plain text and with special tokens. tests/golden/llama-cpp.json has these, a hash of
each file that llama.cpp opened, and the version. --check makes everything again and compares.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

import llama_cpp_cases as cases

GOLDEN = ROOT / "tests/golden/llama-cpp.json"


class Opened:
    """A GGUF file that llama.cpp opened."""

    def __init__(self, path: Path, vocab_only: bool) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"by_llama_cpp.py: llama.cpp does not open {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Compute logits of all positions, float32 (T, V)."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 256
        params.type_k = params.type_v = 0  # float32
        params.flash_attn_type = 0
        context = llama_cpp.llama_init_from_model(self.model, params)
        batch = llama_cpp.llama_batch_init(ids.size, 0, 1)
        batch.n_tokens = ids.size
        for i, token in enumerate(ids.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
                token,
                i,
                1,
                0,
                1,
            )
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("by_llama_cpp.py: llama_decode failed")
        shape = (ids.size, llama_cpp.llama_vocab_n_tokens(self.vocab))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape).copy()

    def encode(self, text: str, special: bool) -> list[int]:
        """Encode a text; special: names of special tokens are these tokens."""
        data = text.encode()
        out = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), out, len(out), False, special)
        return list(out[:count])


def made(folder: Path) -> dict[str, Any]:
    """Write the files, and record what llama.cpp computes."""
    out: dict[str, Any] = {
        "llama_cpp": f"llama-cpp-python {llama_cpp.__version__}",
        "models": {},
        "tokenizers": {},
    }
    path = folder / "m.gguf"
    for name in cases.MODELS:
        cases.write_model(name, path)
        found = Opened(path, False).logits(cases.ids_of(name))[list(cases.KEPT)]
        rows = [" ".join(f"{x:.6g}" for x in row) for row in found]
        out["models"][name] = {"file": cases.fingerprint(path), "logits": rows}
    for name, text in cases.tokenizers(folder / "tokenizer").items():
        cases.write_vocabulary(cases.vocabulary(name, text), path)
        opened = Opened(path, True)
        out["tokenizers"][name] = {
            "file": cases.fingerprint(path),
            "ids": [[" ".join(map(str, opened.encode(t, s))) for s in (False, True)] for t in cases.TEXTS],
        }
    return out


def main() -> int:
    """Returns the exit code."""
    log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        new = made(Path(folder))
    if "--check" not in sys.argv:
        GOLDEN.write_text(json.dumps(new, indent=1) + "\n")
        print(f"wrote {GOLDEN}")
        return 0
    old, wrong = json.loads(GOLDEN.read_text()), []
    for name, row in new["models"].items():
        a, b = (np.array([r.split() for r in x["logits"]], float) for x in (row, old["models"][name]))
        if (
            row["file"] != old["models"][name]["file"]
            or not np.abs(a - b).max() <= cases.CLOSE * np.abs(b).max()
        ):
            wrong.append(name)
    wrong += [name for name, row in new["tokenizers"].items() if row != old["tokenizers"][name]]
    print(f"differ: {', '.join(wrong)}" if wrong else "as recorded")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
