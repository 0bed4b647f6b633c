"""Golden file of labels: what TRL's templates for training and transformers make of 300 random conversations.

    python -m venv env
    env/bin/pip install torch transformers peft trl numba scipy-openblas64 zstandard rich jinja2 ml_dtypes
    env/bin/python tools/golden/trl_labels.py [--out tests/golden]

trl-labels.json: for each family TRL's template for training, which marks answers with {% generation %}, the template that
the family is published with (both from the package trl, Apache-2.0), and the SHA-256 of ids (uint32) and marks (uint8) of each
conversation of `random_talks` in turn, by apply_chat_template(return_assistant_tokens_mask=True).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.resources
import json
import sys
from pathlib import Path

import numpy as np
import transformers
import trl
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from finetune_cases import own_tokenizer, random_talks, special_in

FAMILIES = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "gemma3")
COUNT, SEED = 300, 5


def digest(template: str) -> str:
    """SHA-256 of ids and marks of all conversations."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(own_tokenizer(special_in(template))),
        bos_token="<bos>",
        eos_token="<|endoftext|>",
    )
    out = hashlib.sha256()
    for talk in random_talks(COUNT, SEED):
        got = fast.apply_chat_template(
            talk,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        out.update(np.array(got["input_ids"], "<u4").tobytes())
        out.update(np.array(got["assistant_masks"], np.uint8).tobytes())
    return out.hexdigest()


def main() -> None:
    """Write the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "tests/golden")
    a = p.parse_args()
    theirs = importlib.resources.files(trl) / "chat_templates"
    families = {}
    for name in FAMILIES:
        training = (theirs / f"{name}_training.jinja").read_text()
        published = (theirs / f"{name}.jinja").read_text()
        families[name] = {"training": training, "published": published, "sha256": digest(training)}
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    whole = {
        "source": "templates of the package trl, Apache-2.0",
        "versions": versions,
        "count": COUNT,
        "seed": SEED,
        "families": families,
    }
    (a.out / "trl-labels.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
