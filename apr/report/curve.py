"""Draw the losses of a run as a picture: loss.png."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic import write_figure
from .run_files import TOKEN, loss_unit


def loss_curve(metrics: list[dict[str, Any]], unigram_entropy: float, vocab_size: int, path: Path) -> None:
    """Draw train_loss, its moving mean, val_loss and, for a loss of text, two yardsticks against tokens seen, as a PNG."""
    from matplotlib.figure import Figure

    steps = [m for m in metrics if "train_loss" in m]
    evals = [m for m in metrics if "val_loss" in m]
    tokens = {m["step"]: m["tokens_seen"] for m in steps} | {0: 0}
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    x, y = np.array([m["tokens_seen"] for m in steps]) / 1e6, np.array([m["train_loss"] for m in steps])
    # A line of one point would not be seen.
    look = dict(alpha=0.25, linewidth=0.8) if len(x) > 1 else dict(marker="o", markersize=4)
    axes.plot(x, y, color="tab:blue", label="train, each step", **look)
    width = max(1, len(y) // 50)
    if len(y) >= width > 1:
        axes.plot(
            x[width - 1 :],
            np.convolve(y, np.ones(width) / width, "valid"),
            color="tab:blue",
            label=f"train, mean of {width}",
        )
    points = [(tokens[m["step"]] / 1e6, m["val_loss"]) for m in evals]
    axes.plot(*zip(*points, strict=True), "o-", color="tab:red", markersize=4, label="validation")
    unit = loss_unit(evals)
    yardsticks = (
        (math.log(vocab_size), "uniform guess, ln V"),
        (unigram_entropy, "entropy of token frequencies"),
    )
    for value, text in yardsticks if unit == TOKEN else ():
        axes.axhline(value, color="grey", linewidth=0.8, linestyle="--")
        axes.annotate(
            text,
            (1, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="grey",
        )
    axes.set(xlabel="tokens seen (millions)", ylabel=f"loss ({unit})", title=f"{path.parent.name}: loss")
    axes.grid(alpha=0.2)
    axes.legend(loc="lower left")
    write_figure(path, figure)
