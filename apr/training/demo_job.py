"""Settings of the demonstration run."""

from __future__ import annotations

from typing import Any

# The job of `make pretrain`; all other settings keep their defaults.
DEMO: dict[str, Any] = dict(
    corpus="stdlib",
    model="llama-demo",
    seq_length=128,
    batch_size=4,
    num_steps=3500,
    eval_every=350,
    val_batches=64,
    lr=2e-3,
    lr_min=0.0,
    warmup_steps=175,
    schedule="linear",
    beta2=0.99,
    initializer_range=0.05,
    sample="class Reader:\n    def __init__(self",
)
