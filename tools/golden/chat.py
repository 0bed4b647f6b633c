"""Make tests/golden/chat-templates.json: what transformers makes of conversations with the templates of real models.

    /path/to/python-with-transformers tools/golden/chat.py DATA      DATA: the folder with chat-templates/, qwen2-tokenizer/

The templates are data and stay out of the repository; the file holds the SHA-256 of each, and of every text that
transformers' apply_chat_template renders from it, with the text's length, and token ids where the tokenizer is there.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "chat-templates.json"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}  # stand for themselves in the golden texts
OPTIONS = {"date_string": "26 Jul 2024"}  # what Llama's templates else take from the clock

SYSTEM = {"role": "system", "content": "You are terse.\nNo lists."}
USER = {"role": "user", "content": "  Why is the sky blue?  "}
ANSWER = {"role": "assistant", "content": "<think>\nlight\n</think>\n\nRayleigh scattering."}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, {"role": "user", "content": 'And "red" \u2014 \u65e5\u843d?'}],
    "answered": [USER, ANSWER],
    "marks": [{"role": "user", "content": "{{ 7 * 7 }} <b>&amp;</b> {% if %}"}],
}


def digest(text: str) -> str:
    """SHA-256 of UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def main(data: Path) -> None:
    """Write the golden file."""
    import jinja2
    import transformers
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(data / "qwen2-tokenizer" / "tokenizer.json"), **TOKENS
    )
    out: dict[str, Any] = {
        "made_by": "tools/golden/chat.py",
        "versions": {"transformers": transformers.__version__, "jinja2": jinja2.__version__},
        "tokens": TOKENS,
        "options": OPTIONS,
        "conversations": CONVERSATIONS,
        "templates": {},
    }
    for path in sorted((data / "chat-templates").glob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        rows: dict[str, Any] = {}
        for name, messages in CONVERSATIONS.items():
            for prompt in (True, False):
                rendered = tokenizer.apply_chat_template(
                    messages, chat_template=text, tokenize=False, add_generation_prompt=prompt, **OPTIONS
                )
                row: dict[str, Any] = {"sha256": digest(rendered), "characters": len(rendered)}
                if path.name.startswith("Qwen") and prompt:
                    row["ids"] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
                rows[f"{name}{', prompt' if prompt else ''}"] = row
        out["templates"][path.name] = {"sha256": digest(text), "texts": rows}
    GOLDEN.write_text(json.dumps(out, indent=1, ensure_ascii=True) + "\n")
    print(f"{GOLDEN}: {len(out['templates'])} templates")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
