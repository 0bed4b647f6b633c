"""Golden file of the stories: what TRL's trainers lose at each step of docs/stories.md, on the batches that apr read.

    python -m venv env
    env/bin/pip install torch transformers trl safetensors ml_dtypes numba scipy-openblas64 zstandard rich jinja2
    env/bin/python tools/golden/stories.py [--size toy] [--out tests/golden/stories.json]
    env/bin/python tools/golden/stories.py --size real --data DIR --out bench/stories.json

apr runs each story with its own commands; the batches of its steps are taken as they go into the model. TRL's SFTTrainer and
DPOTrainer begin with the same weights and get the same examples in the same order, one step a batch, with torch's AdamW and the
learning rates of apr's log (TRL's own warm-up begins with 0, a step later): rows of packed examples are taken apart, and every
example stands in a row of its own, as TRL has it.

    NAME.apr, NAME.trl    losses of the steps of a story in float32, nats/token (preferences: of a pair)
    NAME.trl_float64      the same by TRL in float64
    NAME.trl_last_bits    by TRL in float32, from weights each of which is moved by one unit in its last place
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests/support")]

import datasets
import numpy as np
import torch
import transformers
import trl
from docs_stories import farthest
from models import float32_is_float64
from trl.trainer.dpo_trainer import DataCollatorForPreference

from apr.checkpoints.hf import write_hf
from apr.cli.main import main as apr
from apr.common.provenance import circumstances
from apr.data.batches import Batches
from apr.model.hf_config import from_hf
from apr.model.params import Layout
from story_cases import SIZES, STORIES, commands, write_data

IGNORED, DIGITS = -100, 11
Steps = list[tuple[np.ndarray, np.ndarray]]
# Runs by TRL: the dtype, and whether the last bits of the weights are moved.
RUNS = {
    "trl": (torch.float32, False),
    "trl_float64": (torch.float64, False),
    "trl_last_bits": (torch.float32, True),
}


@contextmanager
def recorded() -> Iterator[Steps]:
    """Collect what the shuffled stream gives, step by step."""
    steps: Steps = []
    plain = Batches.next

    def next_(self: Batches) -> tuple[np.ndarray, np.ndarray]:
        batch = plain(self)
        if self.shuffle:
            steps.append((batch[0].copy(), batch[1].copy()))
        return batch

    Batches.next = next_  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        Batches.next = plain  # type: ignore[method-assign]


def examples(batch: tuple[np.ndarray, np.ndarray], separator: int | None) -> list[dict[str, list[int]]]:
    """Take rows apart: the tokens and labels of each example up to its last target, in order."""
    out = []
    for ids, targets in zip(*batch, strict=True):
        tokens = [*ids.tolist(), int(targets[-1])]
        labels = [IGNORED, *targets.tolist()]
        start = 0
        for end in [*(i for i, t in enumerate(tokens) if t == separator), len(tokens)]:
            piece = slice(start, end)
            if any(label != IGNORED for label in labels[piece]):
                last = max(i for i in range(start, end) if labels[i] != IGNORED) + 1
                out.append({"input_ids": tokens[start:last], "labels": labels[start:last]})
            start = end + 1
    return out


def sequential(trainer: Any) -> None:
    """Let a trainer read its data in order."""
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of examples, each in a row of its own."""
    width = max(len(r["input_ids"]) for r in rows)

    def fill(key: str, value: int) -> torch.Tensor:
        return torch.tensor([r[key] + [value] * (width - len(r[key])) for r in rows])

    mask = [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows]
    return {
        "input_ids": fill("input_ids", 0),
        "labels": fill("labels", IGNORED),
        "attention_mask": torch.tensor(mask),
    }


@contextmanager
def arithmetic(dtype: torch.dtype) -> Iterator[None]:
    """Compute in a dtype. For float64, transformers' casts to float32 are taken away, those by method too."""
    if dtype == torch.float32:
        yield
        return
    plain = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        with float32_is_float64():
            yield
    finally:
        torch.Tensor.float = plain  # type: ignore[method-assign]


def loaded(start: Path, run: str) -> Any:
    """Load the weights that a run by TRL begins with."""
    make, (dtype, moves) = transformers.AutoModelForCausalLM, RUNS[run]
    model = make.from_pretrained(start, dtype=torch.float32, attn_implementation="sdpa")
    if moves:
        chance = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in model.parameters():
                # The float32 above it or below it.
                is_less = torch.rand(p.shape, generator=chance) < 0.5
                p.copy_(torch.nextafter(p, torch.where(is_less, -torch.inf, torch.inf)))
    if dtype == torch.float32:
        return model
    # With tables of the rotary embedding in its own precision.
    with arithmetic(dtype):
        wide = make.from_config(model.config, dtype=dtype, attn_implementation="sdpa")
    wide.load_state_dict(model.state_dict())
    return wide


def theirs(
    story: str, start: Path, steps: list[Any], settings: dict[str, Any], rates: list[float], run: str = "trl"
) -> list[float]:
    """Train with TRL at the learning rates of the steps; returns their losses."""
    model = loaded(start, run)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(start / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    data = datasets.Dataset.from_list([{"step": json.dumps(s)} for s in steps])
    losses: list[float] = []
    common = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=1, num_train_epochs=1, learning_rate=settings["lr"],
        weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95,
        adam_epsilon=1e-8, max_grad_norm=1.0, optim="adamw_torch", bf16=False, gradient_checkpointing=False,
        save_strategy="no", report_to=[], use_cpu=True, remove_unused_columns=False, logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip

    def kept(base: type) -> type:
        class Kept(base):  # type: ignore[misc, valid-type]
            """A trainer that keeps the loss of each step, with data that is prepared."""

            def compute_loss(self, *args: Any, **more: Any) -> Any:
                found = super().compute_loss(*args, **more)
                losses.append((found[0] if isinstance(found, tuple) else found).item())
                return found

            def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                    optimizer or self.optimizer, lambda step: [*rates, 0.0][step] / settings["lr"]
                )
                return self.lr_scheduler

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

        return Kept

    if story == "preferences":
        pairs = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
        trainer = kept(trl.DPOTrainer)(
            model=model,
            ref_model=loaded(start, run),
            args=trl.DPOConfig(beta=settings["beta"], **common),
            train_dataset=data,
            processing_class=tokenizer,
            data_collator=lambda rows: pairs(json.loads(rows[0]["step"])),
        )
    else:
        trainer = kept(trl.SFTTrainer)(
            model=model,
            args=trl.SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, **common),
            train_dataset=data,
            processing_class=tokenizer,
            data_collator=lambda rows: padded(json.loads(rows[0]["step"])),
        )
    sequential(trainer)
    with arithmetic(RUNS[run][0]):
        trainer.train()
    return losses


def as_pairs(rows: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """Chosen and rejected examples, which take turns, as TRL's collator has them."""
    out = []
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        prompt = next(i for i, label in enumerate(chosen["labels"]) if label != IGNORED)
        assert chosen["input_ids"][:prompt] == rejected["input_ids"][:prompt]
        out.append(
            {
                "prompt_ids": chosen["input_ids"][:prompt],
                "chosen_ids": chosen["input_ids"][prompt:],
                "rejected_ids": rejected["input_ids"][prompt:],
            }
        )
    return out


def separator_of(run: Path) -> int | None:
    """The id that stands between the examples of a run's rows; None for text."""
    data = json.loads((run / "config.json").read_text())
    found = [v for v in _values(data, "separator") if isinstance(v, int)]
    return found[0] if found else None


def _values(tree: Any, key: str) -> Iterator[Any]:
    if isinstance(tree, dict):
        for k, v in tree.items():
            if k == key:
                yield v
            yield from _values(v, key)


def start_of(story: str, folder: Path, settings: dict[str, Any]) -> Path:
    """The Hugging Face folder of the weights that a story begins with."""
    out = folder / f"hf-{story}"
    if "init" in settings:
        assert apr(["export", str(folder / settings["init"]), "-o", str(out)]) == 0
        return out
    cfg = from_hf(json.loads((folder / settings["model"]).read_text()), "model.json")
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.init(host, 42, 0.02)
    write_hf(out, cfg, layout.named(host), tokenizer_json=(folder / "tok" / "tokenizer.json").read_text())
    return out


def steps_of(story: str, size: str, folder: Path) -> tuple[list[dict[str, float]], list[Any], dict[str, Any]]:
    """Run a story with apr: lines of the log of its steps, their examples, settings. Of its last command."""
    for words in commands(story, size):
        with recorded() as batches:
            code = apr(words)
        assert code == 0, (words, code)
    flags = {k.removeprefix("--"): v for k, v in zip(words[1::2], words[2::2], strict=True)}
    run = folder / flags["run-dir"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train_loss" in line and "grad_norm" in line]
    taken = [examples(batch, separator_of(run)) for batch in batches[: len(lines)]]
    settings = flags | {"lr": float(flags["lr"]), "beta": float(flags.get("beta", 0))}
    return lines, [as_pairs(t) for t in taken] if story == "preferences" else taken, settings


def compact(record: Any) -> str:
    """Write a record as JSON: each list of numbers, rounded to DIGITS, on a line."""
    text = re.sub(r"\d\.\d{9,}(e-?\d+)?", lambda m: f"{float(m[0]):.{DIGITS}g}", json.dumps(record, indent=1))
    return re.sub(r"\[[^][{}\"]*\]", lambda m: f"[{' '.join(m[0][1:-1].split())}]", text) + "\n"


def main() -> None:
    """Run all stories with apr and with TRL, and write the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="toy")
    p.add_argument("--data", type=Path, help="folder of the real data")
    p.add_argument("--out", type=Path, default=ROOT / "tests/golden/stories.json")
    p.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="runs by TRL (default: all)")
    a = p.parse_args()
    packages = {m.__name__: m.__version__ for m in (trl, transformers, torch)}
    out: dict[str, Any] = {"versions": packages, "size": SIZES[a.size]}
    if a.size == "real":
        measured = circumstances()
        out |= measured | {"versions": measured["versions"] | packages, "threads": torch.get_num_threads()}
    folder = Path(tempfile.mkdtemp())
    os.environ["APR_CACHE"] = str(folder / "cache")
    target = a.out.resolve()
    os.chdir(folder)
    write_data(folder, a.size, a.data)
    given = {}
    for story in STORIES:
        lines, steps, settings = steps_of(story, a.size, folder)
        out[story] = {"apr": [line["train_loss"] for line in lines]}
        given[story] = (start_of(story, folder, settings), steps, settings, [line["lr"] for line in lines])
    for run in a.runs:
        for story, found in given.items():
            out[story][run] = theirs(story, *found, run)
            far = farthest(out[story]["apr"], out[story][run])
            print(f"{story}: {len(found[1])} steps, apr beside {run}: at most {far:.1e} apart", flush=True)
            target.write_text(compact(out))


if __name__ == "__main__":
    main()
