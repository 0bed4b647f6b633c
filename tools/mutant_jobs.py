"""Hold jobs of tools/mutants.py that the fifth list added, the files that they read, and the commands that read sound runs.

A flag may name a run of the sound code, runs/sound-of-JOB: it is trained where it is not there yet.
"""

# ruff: noqa: E501

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pinned_jobs

from apr.model.hf_config import to_hf
from apr.model.presets import PRESETS

Flags = tuple[str, ...]
# A template that writes tools, whose answers end by a special token.
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + pinned_jobs.TEMPLATE
QUESTIONS = [
    {"context": "The king said", "choices": [" to the queen", " with a long and heavy sword", " no"], "answer": 0},
    {"context": "Once upon a time", "choices": [" there was a girl", " and", " of the house of Lancaster"], "answer": 0},
    {"context": "What is", "choices": [" it", " blue sky"], "answer": 0},
]  # fmt: skip


def without(flags: Flags, *names: str) -> Flags:
    """Leave out flags with their values."""
    pairs = zip(flags, (*flags[1:], ""), strict=True)
    gone = {i for i, (a, _) in enumerate(pairs) if a in names}
    return tuple(x for i, x in enumerate(flags) if i not in gone and i - 1 not in gone)


def more_jobs(small: Flags, plain: Flags, answers: Flags) -> dict[str, Flags]:
    """Name the jobs by their flags."""
    lora, pairs = (*answers, "--lora-rank", "4"), without(answers, "--instruct", "--seq-length")
    pairs = (*pairs, "--preferences", "pairs.jsonl", "--batch-size", "5")
    model = without(plain, "--model")
    kinds = ("upper", "interval", "mscale", "defaults-olmo2", "parameters")
    return {
        **{kind: (*model, "--model", f"configs/{kind}.json") for kind in kinds},
        "unsaid": without(plain, "--warmup-steps"),
        "unsaid-lora": (*without(answers, "--lr", "--warmup-steps"), "--lora-rank", "4"),
        "epochs": (*without(plain, "--num-steps"), "--epochs", "0.031"),
        "patience": (*plain, "--lr", "0.04", "--eval-every", "1", "--patience", "1"),
        "target": (*plain, "--eval-every", "2", "--target-val-loss", "9", "--min-epochs", "3"),
        "stopping": (
            "--corpus", "corpus/stories.jsonl", *without(plain, "--corpus"), "--seq-length", "128", "--batch-size", "1",
            "--micro-batch-size", "1", "--num-steps", "400", "--eval-every", "50", "--save-every", "50", "--on-exhausted", "stop",
        ),
        "files": ("--corpus", "files", *without(plain, "--corpus")),
        "cached": plain,
        "cached-chats": answers,
        "dataset": ("--dataset", "shards", "--tokenizer", "tok", *without(plain, "--corpus", "--val-fraction")),
        "shapes": ("--init", BASE, "--instruct", "shapes.jsonl", "--chat-template", "tools.jinja", *small, "--seq-length", "128"),
        "dpo-short": (*pairs, "--seq-length", "64"),
        "simpo-smoothed": (*pairs, "--seq-length", "128", "--preference-loss", "simpo", "--label-smoothing", "0.1"),
        "alpha": (*lora, "--lora-alpha", "5"),
        "lora-init": (*answers, "--lora-init", "runs/sound-of-alpha/ckpt/epoch-002-adapter"),
        "ladder": (*plain, "--save-every", "2", "--keep-states", "2"),
        "ranks": (*plain, "--batch-size", "5", "--micro-batch-size", "1", "--ranks", "2"),
        "ranks-dropout": (*lora, "--lora-dropout", "0.2", "--micro-batch-size", "1", "--ranks", "2"),
        "tasks": (*plain, "--eval-tasks", "uneven.jsonl", "--eval-tasks-limit", "1"),
        "tasks-lora": (*lora, "--lr", "0.03", "--eval-tasks", "uneven.jsonl"),
    }  # fmt: skip


BASE = "runs/base/ckpt/epoch-002.apr"
# Flags of a run of the faulty code that fills the cache first.
BEFORE: dict[str, Flags] = {
    "cached": ("--val-fraction", "0.4", "--num-steps", "2", "--eval-every", "2", "--warmup-steps", "1"),
    "cached-chats": ("--chat-template", "other.jinja", "--num-steps", "2", "--eval-every", "2", "--warmup-steps", "1"),
}  # fmt: skip
SHORT = ("--max-tokens", "24", "--json")
# {name: (line, standard input)}; OUT is the folder of the fault.
LINES: dict[str, tuple[Flags, str]] = {
    "gguf": (("export", "runs/sound-of-odd/ckpt/epoch-002.apr", "--format", "gguf", "--dtype", "float32", "-o", "OUT/odd.gguf"), ""),
    "hf": (("export", "runs/sound-of-odd/ckpt/epoch-002.apr", "-o", "OUT/hf"), ""),
    "merge": (("merge", BASE, "runs/sound-of-adapters/ckpt/epoch-002-adapter", "-o", "OUT/merged.apr"), ""),
    "likeliest": (("run", BASE, "The king said", "--temperature", "0", *SHORT), ""),
    "drawn": (("run", BASE, "The king said", "--top-p", "0.6", *SHORT), ""),
    "penalty": (("run", BASE, "The king the king", "--temperature", "2", "--repetition-penalty", "3", *SHORT), ""),
    "stop": (("run", BASE, "The king said", "--temperature", "0", "--stop", "e t", "--stop", "th", "--stop", "ou", *SHORT), ""),
    "eval": (("eval", BASE, "--text", "corpus/plays/0.txt", "--seq-length", "48", "--stride", "16", "--max-tokens", "2000", "--json"), ""),
    "likely": (("run", BASE, "The king said", "--min-p", "0.3", *SHORT), ""),
    "few": (("run", BASE, "The king said", "--top-k", "3", *SHORT), ""),
    "together": (("run", BASE, "--prompts", "prompts.txt", "--temperature", "0.5", *SHORT), ""),
    "choices": (("eval", BASE, "--choices", "uneven.jsonl", "--json"), ""),
    "rounded": (("export", BASE, "--dtype", "bfloat16", "-o", "OUT/rounded"), ""),
    "qwen": (("export", BASE, "--format", "gguf", "--dtype", "float32", "-o", "OUT/qwen.gguf"), ""),
    "yarn": (("export", "runs/sound-of-yarn/ckpt/epoch-002.apr", "--format", "gguf", "--dtype", "float32", "-o", "OUT/yarn.gguf"), ""),
    "half": (("export", BASE, "--format", "gguf", "--dtype", "float16", "-o", "OUT/half.gguf"), ""),
    "windowed": (("export", "runs/sound-of-window/ckpt/epoch-002.apr", "--format", "gguf", "-o", "OUT/window.gguf"), ""),
    "int8": (("run", BASE, "The king", "--dtype", "int8", *SHORT), ""),
    "chat": (
        ("run", "runs/sound-of-instruct/ckpt/epoch-002.apr", "--chat", "--temperature", "0", *SHORT),
        "Tell me a long story.\n/reset\nWho?\n/reset\nTell me a long story.\n/reset\nThe token <|endoftext|> ends.\n",
    ),
    "undrawable": (("run", "runs/sound-of-wide/ckpt/epoch-002.apr", "The king said", "--temperature", "2", *SHORT), ""),
    "shards": (("eval", BASE, "--dataset", "shards", "--seq-length", "32", "--max-tokens", "600", "--json"), ""),
    "masked-shards": (("eval", BASE, "--dataset", "shards", "--seq-length", "64", "--mask-documents", "--json"), ""),
    "separated": (
        ("tokenize", "encode-corpus", "separated.txt", "--tokenizer", "tok", "--separator", "%%", "--val-fraction", "0.3", "-o",
        "OUT/shards", "--json"), "",
    ),
    "pieces": (
        ("tokenize", "encode-corpus", "corpus/plays/0.txt", "--tokenizer", "tok", "--piece-bytes", "2000", "--val-fraction", "0.3",
        "-o", "OUT/shards", "--json"), "",
    ),
    "tokenizer": (
        ("tokenize", "train", "corpus/plays", "corpus/unicode.txt", "--vocab-size", "600", "--normalization", "nfc",
        "--min-frequency", "60", "-o", "OUT/tok", "--json"), "",
    ),
    "ended": (("pretrain", "--resume", "--run-dir", "runs/sound-of-worse", "--json"), ""),
    "plan": (("plan", "--model", "configs/qwen2.json", "--seq-length", "64", "--num-steps", "100", "--json"), ""),
    "plan-words": (("plan", "--model", "configs/qwen2.json", "--seq-length", "64", "--num-steps", "100"), ""),
}  # fmt: skip


def more_inputs(r: Any) -> None:
    """Write the files that the jobs read."""
    llama, qwen2 = pinned_jobs.CONFIGS["llama"], pinned_jobs.CONFIGS["qwen2"]
    olmo2, smollm3 = (
        to_hf(PRESETS[f"{kind}-tiny"]) | {"vocab_size": pinned_jobs.VOCAB, "max_position_embeddings": 128}
        for kind in ("olmo2", "smollm3")
    )
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for name, config in {
        "upper": qwen2 | {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
        "interval": {k: x for k, x in smollm3.items() if k not in ("no_rope_layers", "layer_types")}
        | {"no_rope_layer_interval": 2},
        "mscale": llama | {"rope_scaling": yarn | {"mscale": 0.6, "mscale_all_dim": 1.0}},
        "defaults-olmo2": {k: x for k, x in olmo2.items() if k != "rms_norm_eps"},
        "parameters": {k: x for k, x in llama.items() if k != "rope_theta"}
        | {"rope_parameters": {"rope_theta": 70000.0, "rope_type": "default"}},
    }.items():
        pinned_jobs.write(r, f"configs/{name}.json", json.dumps(config))
    pinned_jobs.write(r, "uneven.jsonl", pinned_jobs.jsonl(QUESTIONS))
    pinned_jobs.write(r, "tools.jinja", TOOLS)
    others = pinned_jobs.TEMPLATE.replace("}}: ", "}}> ").replace("assistant:", "assistant>")
    pinned_jobs.write(r, "other.jinja", others)
    texts = pinned_jobs.stories(r, 90)
    pinned_jobs.write(
        r, "separated.txt", "\n%%\n".join(f"{t}\nOf a hundred %%\nso many." for t in texts[:40])
    )
    _files(r, texts)
    pinned_jobs.write(r, "shapes.jsonl", pinned_jobs.jsonl([_shape(i, t) for i, t in enumerate(texts[:72])]))


def _files(r: Any, texts: list[str]) -> None:
    """Write a folder of every kind of file, of which lines lie across blocks and the last has no end."""
    import pyarrow
    import pyarrow.parquet

    (r.work / "files").mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": texts[:20]})
    pyarrow.parquet.write_table(table, r.work / "files" / "rows.parquet", row_group_size=8)
    pinned_jobs.write(r, "files/array.json", json.dumps([{"text": t} for t in texts[20:30]]))
    lines = [{"pad": "x" * 30_000, "text": t} for t in texts[30:75]]
    pinned_jobs.write(r, "files/lines.jsonl", pinned_jobs.jsonl(lines).rstrip("\n"))
    pinned_jobs.write(r, "files/marked.txt", "\ufeff" + texts[75])
    pinned_jobs.write(r, "files/CAPITALS.TXT", texts[76])


def _shape(i: int, text: str) -> dict[str, Any]:
    """Write a record of one of six shapes."""
    said, asked = text[:60], f"Tell me story {i}."
    if i % 6 == 0:
        return {"instruction": asked, "input": f"about {text[60:75]}", "output": said}
    if i % 6 == 1:
        return {"prompt": asked, "response": said, "history": [[f"Question {i}", text[60:80]]]}
    if i % 6 == 2:
        return {"prompt": asked, "response": f"\n {said} \n"}
    user: dict[str, Any] = {"role": "user", "content": asked}
    turns = [user, {"role": "assistant", "content": said}]
    if i % 6 == 3:
        earlier = [
            {"role": "user", "content": "Go on."},
            {"role": "assistant", "content": text[60:90], "training": False},
        ]
        return {"messages": [*earlier, *turns]}  # fmt: skip
    if i % 6 == 4:
        tool = {"type": "function", "function": {"name": f"look_{i}", "parameters": {}}}
        return {"messages": turns, "tools": [tool]}
    parts = [{"type": "text", "text": said[:30]}, {"type": "text", "text": said[30:]}]
    return {"messages": [user, {"role": "assistant", "content": parts}]}


def more_files(bench: Any, work: Path) -> None:
    """Make what commands of the sound code make: a tokenizer of its own, and shards without a second side."""
    for line in (
        ("export", BASE, "-o", "base-hf"),
        ("tokenize", "import-hf", "base-hf/tokenizer.json", "-o", "tok"),
        (
            "tokenize",
            "encode-corpus",
            "corpus/plays",
            "--tokenizer",
            "tok",
            "--val-fraction",
            "0",
            "-o",
            "shards",
        ),
    ):
        done = bench.apr(bench.sound, *line)
        if done.returncode:
            raise SystemExit(f"{' '.join(line)}: exit code {done.returncode}\n{done.stderr}")
