"""tests/golden/eval.json: losses and choices as Hugging Face transformers computes them, for tests of apr eval.

    python -m venv torch-env && torch-env/bin/pip install torch transformers safetensors
    torch-env/bin/python tools/golden/eval.py --data PATH/TO/DATA [--check]

Of apr nothing is imported: tokens come from transformers' tokenizer, losses from its models, windows from the loop of
its guide on perplexity (https://huggingface.co/docs/transformers/perplexity), with max_length = seq + 1, as its windows
count a last token that is predicted and never read. The guide weighs each window by one token fewer than it scores when
windows overlap; here tokens are counted.

    versions       torch, transformers, tokenizers, python
    stories        stories260K, float32, on the first `characters` of the TinyStories excerpt: `tokens` in all, and in
                   `windows` for each (seq, stride) the sum of losses in nats, the tokens scored
    tiny           the same for the random weights of tests/golden/NAME.safetensors and ids
                   numpy.random.default_rng(seed).integers(0, V, length)
    choices        stories260K on the items of `items`: for each continuation the log-probability in nats, its tokens, and
                   whether each is the most likely one; context and continuation as lm-evaluation-harness splits them

--check computes again and compares: integers exactly, floats to 1e-5 a token. Exit 1 when anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
CHARACTERS = 8_000
STORIES_WINDOWS = ((256, 256), (256, 100), (512, 512))
TINY_WINDOWS = ((24, 24), (24, 10), (63, 25))
LENGTH, SEED = 300, 11

ITEMS: list[dict[str, Any]] = [
    {
        "question": "Who went to the park with Lily?",
        "choices": {
            "text": ["her mom", "a purple tractor", "the moon and the stars"],
            "label": ["A", "B", "C"],
        },
        "answerKey": "A",
    },
    {
        "question": "What did the dog do with the ball?",
        "choices": {"text": ["It sang it", "It played with it"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    {
        "goal": "How can Tim reach the top shelf?",
        "sol1": "He stands on a box.",
        "sol2": "He eats the box.",
        "label": 0,
    },
    {"goal": "To make mom happy,", "sol1": "break her cup", "sol2": "give her a big hug", "label": "1"},
    {
        "context": "Once upon a time, there was a little girl named",
        "choices": [" Lily", " Refrigerator", " xylophone \u00e9t\u00e9"],
        "answer": 0,
    },
    {
        "context": "The cat sat on the mat. ",
        "choices": ["It was happy.", "It were happy."],
        "answer": "It was happy.",
    },
    {"context": "", "choices": ["Once upon a time", "Time a upon once"], "answer": 0},
]


def continuations(item: dict[str, Any]) -> tuple[str, list[str]]:
    """Context and continuations of an item, as the tasks arc_easy and piqa of the harness join them."""
    if "question" in item:
        return f"Question: {item['question']}\nAnswer:", [" " + t for t in item["choices"]["text"]]
    if "goal" in item:
        return f"Question: {item['goal']}\nAnswer:", [" " + item["sol1"], " " + item["sol2"]]
    return item["context"], item["choices"]


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor, seq: int, stride: int) -> dict[str, Any]:
    """The guide's loop over ids (1, n)."""
    nats, scored, before = 0.0, 0, 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + seq + 1, ids.size(1))
        part = ids[:, begin:end]
        targets = part.clone()
        targets[:, : -(end - before)] = -100
        count = int((targets[:, 1:] != -100).sum())  # the model shifts the labels by one
        nats += float(model(part, labels=targets).loss) * count
        scored += count
        before = end
        if end == ids.size(1):
            break
    return {"seq": seq, "stride": stride, "nats": nats, "tokens": scored}


@torch.no_grad()
def choice(model: Any, tokenizer: Any, context: str, following: str) -> dict[str, Any]:
    """One continuation, split as TemplateLM._encode_pair and .loglikelihood of the harness do it."""
    if context:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, following = context[:-spaces], context[-spaces:] + following
        head = tokenizer(context).input_ids
        rest = tokenizer(context + following).input_ids[len(head) :]
    else:
        head, rest = [tokenizer.bos_token_id], tokenizer(following, add_special_tokens=False).input_ids
    logits = model(torch.tensor([[*head, *rest]])).logits[0, len(head) - 1 : -1].double()
    want = torch.tensor(rest)
    logp = torch.log_softmax(logits, -1).gather(1, want[:, None]).sum()
    return {"logp": float(logp), "tokens": len(rest), "greedy": bool((logits.argmax(-1) == want).all())}


def models() -> list[Path]:
    """The files of tools/golden/models.py."""
    found = []
    for path in sorted(GOLDEN.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            if {"config", "adamw"} <= set(f.metadata() or {}):
                found.append(path)
    return found


def tiny(path: Path) -> dict[str, Any]:
    """A model of random weights, of a golden file of tools/golden/models.py."""
    with safe_open(path, "pt") as f:
        config = json.loads(f.metadata()["config"])
        weights = {
            k.removeprefix("weight."): f.get_tensor(k)
            for k in f.keys()  # noqa: SIM118 -- it is no dict
            if k.startswith("weight.")
        }
    kind = config.pop("model_type")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **config), attn_implementation="eager", dtype=torch.float32
    ).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        sys.exit(f"{path}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    ids = np.random.default_rng(SEED).integers(0, config["vocab_size"], LENGTH)
    return {"windows": [perplexity(model, torch.tensor(ids)[None], *w) for w in TINY_WINDOWS]}


def compute(data: Path) -> dict[str, Any]:
    """Everything in the file."""
    folder, text = data / "stories260K" / "hf", data / "tinystories-excerpt" / "tinystories-train-head.txt"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    part = text.read_text()[:CHARACTERS]
    ids = tokenizer(part, return_tensors="pt").input_ids
    return {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "python": platform.python_version(),
        },
        "stories": {
            "characters": CHARACTERS,
            "text_sha256": hashlib.sha256(part.encode()).hexdigest(),
            "tokens": ids.size(1),
            "bytes": len(part.encode()),
            "windows": [perplexity(model, ids, *w) for w in STORIES_WINDOWS],
        },
        "tiny": {
            "length": LENGTH,
            "seed": SEED,
            "models": {path.stem: tiny(path) for path in models()},
        },
        "choices": [
            {"item": item, "scores": [choice(model, tokenizer, context, c) for c in following]}
            for item in ITEMS
            for context, following in [continuations(item)]
        ],
    }


def different(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two results differ."""
    if where == "/versions":
        return []
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in different(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in different(x, y, f"{where}/{i}")]
    if isinstance(a, float) and isinstance(b, float):
        return [] if abs(a - b) <= 1e-5 * max(1.0, abs(a)) else [f"{where}: {a} {b}"]
    return [] if a == b else [f"{where}: {a} {b}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the real data")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads that spin while they wait: slow for models this small
    file = GOLDEN / "eval.json"
    found = compute(args.data)
    if args.check:
        off = different(json.loads(file.read_text()), found)
        print("\n".join(off) or f"{file}: the same")
        return 1 if off else 0
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{file}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
