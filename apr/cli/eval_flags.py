"""Options of `apr eval`, and which of its measures honours them."""

from __future__ import annotations

from dataclasses import dataclass

from .. import backends
from ..common.options import MAX_INTEGER, device_option, json_option, option, threads_option
from ..evaluation.sandbox import MAX_SECONDS

MODES = ("dataset", "text", "choices", "humaneval", "tasks")
SEQ_LENGTH = 1024


@dataclass(frozen=True)
class Flags:
    """Options of `apr eval`."""

    model: str = option("an .apr or GGUF file or a Hugging Face folder", positional=True, path=True)
    dataset: str | None = option(
        "folder of token shards, or one that holds val/ (made by the model's tokenizer)",
        metavar="FOLDER",
        path=True,
    )
    text: str | None = option(
        "file or folder of text, JSONL or Parquet, hf://datasets/org/name[:split]; of a folder with splits, validation or test; "
        "every document is scored by itself",
        path=True,
    )
    choices: str | None = option(
        "JSONL of multiple-choice questions: ARC, PIQA or plain", metavar="FILE", path=True
    )
    humaneval: str | None = option("HumanEval.jsonl or HumanEval.jsonl.gz", metavar="FILE", path=True)
    tasks: str | None = option(
        "tasks of lm-evaluation-harness by name, such as arc_easy,hellaswag, and files of questions",
        metavar="TASKS",
    )
    seq_length: int | None = option(
        f"tokens that the model reads at once (default: {SEQ_LENGTH}, or as many as the model can)",
        at_least=1,
        at_most=MAX_INTEGER,
        metavar="TOKENS",
    )
    stride: int | None = option(
        "tokens between the beginnings of windows; below --seq-length only the last STRIDE tokens of a window are scored, "
        "each with more context (default: --seq-length)",
        at_most=MAX_INTEGER,
        metavar="TOKENS",
    )
    max_tokens: int | None = option(
        "score about so many tokens (default: all)", at_least=1, at_most=MAX_INTEGER
    )
    batch_size: int | None = option(
        "windows at once (default: by memory)", at_least=1, at_most=MAX_INTEGER, metavar="WINDOWS"
    )
    bos: str = option(
        "ids before each text: auto, those that the tokenizer itself puts there; eos, the end-of-text id; none",
        "auto",
        choices=("auto", "eos", "none"),
    )
    content_field: str = option("key or column of the text in JSONL and Parquet", "text", metavar="KEY")
    mask_documents: bool = option("attention ends at the end-of-text ids of the shards", False)
    limit: int | None = option(
        "only the first so many questions or problems (default: all)",
        at_least=1,
        at_most=MAX_INTEGER,
        metavar="COUNT",
    )
    samples: int = option("programs for each problem", 1, at_least=1, at_most=10_000, metavar="PROGRAMS")
    temperature: float | None = option(
        "temperature of the draws (default: 0 for one sample, which takes the most likely tokens, else 0.8)",
        at_least=0,
        at_most=1e6,
    )
    top_k: int = option(
        "draw from so many of the likeliest tokens only; 0: from all",
        0,
        at_least=0,
        at_most=MAX_INTEGER,
        metavar="TOKENS",
    )
    top_p: float = option(
        "draw from the fewest tokens that together have this probability",
        1.0,
        above=0,
        at_most=1,
        metavar="PROBABILITY",
    )
    max_new_tokens: int = option("most tokens of a program", 512, at_least=1, at_most=MAX_INTEGER)
    timeout: float = option(
        "seconds that a program may run", 5.0, above=0, at_most=MAX_SECONDS, metavar="SECONDS"
    )
    allow_unsafe: bool = option(
        "run programs also where nothing keeps them from the files and processes of this machine", False
    )
    seed: int = option("seed of the draws", 42, at_least=0, at_most=MAX_INTEGER)
    picture: str | None = option("PNG of the loss by position in the window", metavar="FILE", path=True)
    output: str | None = option(
        "JSONL with a line for each question or program", short="o", metavar="FILE", path=True
    )
    tokenizer: str | None = option(
        "tokenizer.json or its folder, for a checkpoint that holds none", path=True
    )
    device: str = device_option()
    backend: str | None = option(
        "reference, cpu or cuda; chooses the backend where --device does not", choices=backends.NAMES
    )
    dtype: str | None = option(
        "dtype of weights and activations (default: bfloat16 on cuda, float32 on cpu, float64 on reference)",
        choices=("float64", "float32", "bfloat16"),
    )
    threads: int | None = threads_option()
    json: bool = json_option()


# Flags that every measure honours, and those of each.
ALWAYS = {"model", "tokenizer", "device", "backend", "dtype", "threads", "json"}
WINDOWS = {"seq_length", "batch_size"}
HONOURED = {
    "dataset": WINDOWS | {"stride", "max_tokens", "mask_documents", "picture"},
    "text": WINDOWS | {"stride", "max_tokens", "bos", "content_field", "picture"},
    "choices": WINDOWS | {"bos", "limit", "output"},
    "tasks": WINDOWS | {"limit", "allow_unsafe"},
    "humaneval": {
        "limit",
        "samples",
        "temperature",
        "top_k",
        "top_p",
        "max_new_tokens",
        "timeout",
        "allow_unsafe",
        "seed",
        "output",
    },
}
