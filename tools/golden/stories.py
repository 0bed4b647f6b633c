"""Golden file of the stories: what TRL's trainers lose at each step of docs/stories.md, on the batches that apr read.

    python -m venv env
    env/bin/pip install torch transformers trl safetensors ml_dtypes numba scipy-openblas64 zstandard rich jinja2
    env/bin/python tools/golden/stories.py [--size toy] [--out tests/golden/stories.json]
    env/bin/python tools/golden/stories.py --size real --data DIR --out bench/stories.json

apr runs each story with its own commands; the batches of its steps are taken as they go into the model. TRL's SFTTrainer and
DPOTrainer begin with the same weights and get the same examples in the same order, one step a batch, in float32, with torch's
AdamW: rows of packed examples are taken apart, and every example stands in a row of its own, as TRL has it.

    NAME.apr, NAME.trl    losses of the steps of a story, nats/token (preferences: of a pair)
    NAME.seconds          [apr, TRL] for those steps
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

import datasets
import numpy as np
import torch
import transformers
import trl
from trl.trainer.dpo_trainer import DataCollatorForPreference

from apr.checkpoints.hf import write_hf
from apr.cli.main import main as apr
from apr.data.batches import Batches
from apr.model.hf_config import from_hf
from apr.model.params import Layout
from story_cases import SIZES, STORIES, commands, write_data

IGNORED = -100
Steps = list[tuple[np.ndarray, np.ndarray]]


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


def theirs(story: str, start: Path, steps: list[Any], settings: dict[str, Any]) -> tuple[list[float], float]:
    """Train with TRL; returns the losses of the steps and the seconds."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(start / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    data = datasets.Dataset.from_list([{"step": json.dumps(s)} for s in steps])
    losses: list[float] = []
    common = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=1, num_train_epochs=1, learning_rate=settings["lr"],
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95,
        adam_epsilon=1e-8, max_grad_norm=1.0, optim="adamw_torch", bf16=False, gradient_checkpointing=False,
        save_strategy="no", report_to=[], use_cpu=True, remove_unused_columns=False, logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip

    def kept(base: type) -> type:
        class Kept(base):  # type: ignore[misc, valid-type]
            """A trainer that keeps the loss of each step, with data that is prepared."""

            def compute_loss(self, *args: Any, **more: Any) -> Any:
                found = super().compute_loss(*args, **more)
                losses.append(float(found[0] if isinstance(found, tuple) else found))
                return found

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

        return Kept

    if story == "preferences":
        pairs = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
        trainer = kept(trl.DPOTrainer)(
            model=model,
            ref_model=transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
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
    began = time.perf_counter()
    trainer.train()
    return losses, time.perf_counter() - began


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


def main() -> None:
    """Run all stories twice and write the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="toy")
    p.add_argument("--data", type=Path, help="folder of the real data")
    p.add_argument("--out", type=Path, default=ROOT / "tests/golden/stories.json")
    a = p.parse_args()
    out: dict[str, Any] = {
        "versions": {
            "trl": trl.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "size": SIZES[a.size],
    }
    folder = Path(tempfile.mkdtemp())
    os.environ["APR_CACHE"] = str(folder / "cache")
    target = a.out.resolve()
    os.chdir(folder)
    write_data(folder, a.size, a.data)
    for story in STORIES:
        for words in commands(story, a.size):
            with recorded() as steps:
                code = apr(words)
            assert code == 0, (words, code)
        flags = {k.removeprefix("--"): v for k, v in zip(words[1::2], words[2::2], strict=True)}
        settings = flags | {"lr": float(flags["lr"]), "beta": float(flags.get("beta", 0))}
        run = folder / flags["run-dir"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        ours = [line["train_loss"] for line in lines if "train_loss" in line and "grad_norm" in line]
        taken = [examples(batch, separator_of(run)) for batch in steps[: len(ours)]]
        rows = [as_pairs(t) for t in taken] if story == "preferences" else taken
        got, seconds = theirs(story, start_of(story, folder, settings), rows, settings)
        worst = max(abs(x - y) / abs(y) for x, y in zip(ours, got, strict=True))
        print(
            f"{story}: {len(ours)} steps, {ours[0]:.6f} -> {ours[-1]:.6f}, TRL {got[-1]:.6f}, worst {worst:.1e}",
            flush=True,
        )
        spent = sum(line["step_seconds"] for line in lines if "step_seconds" in line)
        out[story] = {
            "apr": ours,
            "trl": got,
            "worst": worst,
            "seconds": [round(spent, 2), round(seconds, 2)],
        }
    target.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
