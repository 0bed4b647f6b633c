"""Golden file of preferences: what TRL's own losses of pairs and torch's gradients are for a small model.

    python -m venv env
    env/bin/pip install torch transformers peft trl safetensors ml_dtypes numba scipy-openblas64 zstandard rich jinja2
    env/bin/python tools/golden/preferences.py [--out tests/golden]

The model is that of tests/golden/llama.safetensors, in float64; the reference is that model with noise. preferences.json:

    pairs                    [prompt, chosen, rejected] of ids, each a list
    reference                [chosen, rejected] log-probabilities of each pair by the reference
    logps                    the same by the model
    losses.CASE.loss         mean over the pairs, by DPOTrainer._compute_loss, CPOTrainer.cpo_loss or ORPOTrainer.odds_ratio_loss
    losses.CASE.settings     of apr, for that loss
    losses.CASE.gradients    {Hugging Face name: [norm, sum of gradient times signs]} by autograd; signs: see `signs`
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zlib
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from peft_adapters import ROOT, base_model, float32_is_float64

NOISE, SEED = 0.05, 11
CASES: dict[str, dict[str, Any]] = {
    "dpo": dict(preference_loss="dpo", beta=0.3),
    "dpo-smoothed": dict(preference_loss="dpo", beta=0.3, label_smoothing=0.2),
    "ipo": dict(preference_loss="ipo", beta=0.4),
    "simpo": dict(preference_loss="simpo", beta=2.0, simpo_gamma=0.7),
    "orpo": dict(preference_loss="orpo", beta=0.5),
}


def make_pairs(vocab_size: int) -> list[list[list[int]]]:
    """Draw prompts with two answers; the last id is left for the border."""
    rng = np.random.default_rng(SEED)
    return [
        [rng.integers(0, vocab_size - 1, n).tolist() for n in sizes]
        for sizes in ((4, 5, 3), (3, 2, 6), (6, 4, 4))
    ]


def signs(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the signs of a tensor by its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.integers(0, 2, shape) * 2.0 - 1.0


class Scored(torch.nn.Module):
    """A model that gives what TRL's patched head gives: log_probs of labels, 0 where there is none."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any, **_: Any) -> Any:
        with float32_is_float64():
            logits = self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        labels = labels[:, 1:]
        logps = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (
            labels >= 0
        )
        return SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=logps > 1)


def batch_of(pairs: list[list[list[int]]]) -> dict[str, torch.Tensor]:
    """Pad as TRL does: all chosen, then all rejected."""
    rows = [(p, pair[k]) for k in (1, 2) for pair in pairs for p in pair[:1]]
    width = max(len(p) + len(a) for p, a in rows)

    def pad(x: list[list[int]]) -> torch.Tensor:
        return torch.tensor([[*r, *[0] * (width - len(r))] for r in x])

    return {
        "input_ids": pad([p + a for p, a in rows]),
        "attention_mask": pad([[1] * len(p + a) for p, a in rows]),
        "completion_mask": pad([[0] * len(p) + [1] * len(a) for p, a in rows]),
    }


def logps(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sums of the log-probabilities of completions, chosen and then rejected."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return Scored(model)(batch["input_ids"], batch["attention_mask"], labels).log_probs.sum(1)


def loss_of(name: str, s: dict[str, Any], model: Any, batch: dict[str, Any], reference: torch.Tensor) -> Any:
    """Ask TRL for the mean loss."""
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    lengths = batch["completion_mask"].sum(1)
    if name in ("dpo", "ipo"):
        ref = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference.chunk(2), strict=True))
        me = SimpleNamespace(
            model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, ld_alpha=None,
            precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=["sigmoid" if name == "dpo" else "ipo"],
            loss_weights=[1.0], beta=s["beta"], label_smoothing=0.0, use_weighting=False, _total_train_tokens=0, _tp_size=1,
            _metrics=defaultdict(lambda: defaultdict(list)),
        )  # fmt: skip
        return DPOTrainer._compute_loss(me, Scored(model), {**batch, **ref}, False)
    sums = logps(model, batch)
    if name == "dpo-smoothed":
        # TRL 1 keeps label smoothing of the sigmoid loss in CPOTrainer: log-ratios in the place of log-probabilities.
        me = SimpleNamespace(
            alpha=0.0, accelerator=same, loss_type="sigmoid", beta=s["beta"], label_smoothing=0.2
        )
        return CPOTrainer.cpo_loss(me, *(sums - reference).chunk(2))[0].mean()
    means = (sums / lengths).chunk(2)
    me = SimpleNamespace(accelerator=same, alpha=0.0, loss_type="simpo", beta=s["beta"], label_smoothing=0.0)
    if name == "simpo":
        me.simpo_gamma = s["simpo_gamma"]
        return CPOTrainer.cpo_loss(me, *means)[0].mean()
    with float32_is_float64():
        torch.Tensor.float, was = torch.Tensor.double, torch.Tensor.float
        odds = ORPOTrainer.odds_ratio_loss(me, *means)[0]
        torch.Tensor.float = was
    # Of the answers alone, and by pair: TRL's own counts prompts too, over all tokens of the batch.
    return -means[0].mean() - odds.mean()


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "tests/golden")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        model, other = (base_model("llama", Path(folder)) for _ in range(2))
    torch.manual_seed(SEED)
    with torch.no_grad():
        for p in other.parameters():
            p += NOISE * p.std().nan_to_num(0.0) * torch.randn_like(p)
    pairs = make_pairs(model.config.vocab_size)
    batch = batch_of(pairs)
    with torch.no_grad():
        reference, own = logps(other, batch), logps(model, batch)
    losses: dict[str, Any] = {}
    for name, s in CASES.items():
        model.zero_grad()
        loss = loss_of(name, s, model, batch, reference)
        loss.backward()
        gradients = {}
        for n, p in model.named_parameters():
            g = p.grad.numpy()
            gradients[n] = [float(np.linalg.norm(g)), float((g * signs(n, g.shape)).sum())]
        losses[name] = {"settings": s, "loss": loss.item(), "gradients": gradients}
    columns = [torch.stack(x.chunk(2), 1).tolist() for x in (reference, own)]
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    found = {
        "versions": versions,
        "pairs": pairs,
        "reference": columns[0],
        "logps": columns[1],
        "losses": losses,
    }
    (out / "preferences.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
