"""Rows of cases.py in which each planted fault of a CUDA kernel must show, at the shapes of a small model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from apr.backends.contract import OPS
from apr.bisect.planted.kernel_faults import KernelFault
from cases import Backend, Row, make, rows, run
from host_shim import CASE, table
from precision import figures, flash, off

MMA = "attention_mma"
WGMMA = "attention_wgmma"


# Two sequences of 17 tokens through the sizes of the presets *-tiny; the second line of attention is llama-tiny.
TOKENS = 2 * 17


SHAPES: dict[str, list[Row]] = {  # module -> rows
    "adapted": [*table("adapted", "72 56 5, 40 56 20"), *table("adapted_int8", "72 56 5, 40 80 16")],
    "low_rank": [*table("adapted_bwd_a", "17 4104 16"), *table("adapted_bwd_b", "17 4104 16")],
    "embedding": table("embedding", f"{TOKENS} 56 123"),
    "bias": table("linear", f"{TOKENS} 72 56"),
    "dropout": table("dropout", "2 17 56, 3 5 59"),
    "norm": [
        *table("add_rmsnorm", f"{TOKENS} 56"),
        *table("add_rmsnorm_first", f"{TOKENS} 40"),
        *table("head_rmsnorm", f"{TOKENS} 4 12 0 4 8, {TOKENS} 2 12 4 6 8"),
    ],
    "rope": table("rope", "2 17 7 4 0 9, 2 17 4 5 0 8"),
    "attention": [
        *table("attention", "2 17 7 1 8, 2 17 4 2 10"),
        *table("attention_window", "2 17 4 4 10 5"),
    ],
    MMA: [
        *table("attention", "2 17 6 2 32, 2 17 3 1 64"),
        *table("attention_window", "2 17 4 4 32 5"),
    ],
    WGMMA: [
        *table("attention", "2 17 4 2 64, 1 59 2 1 128"),
        *table("attention_window", "2 17 4 4 64 5"),
    ],
    "swiglu": [
        *table("swiglu", f"{TOKENS} 72, {TOKENS} 56"),
        *table("swiglu_again", f"{TOKENS} 72, {TOKENS} 56"),
    ],
    "loss": table("cross_entropy_rows_apart", f"{TOKENS} 123 128"),  # as pad_vocab lays them out
    "loss_cluster": table("cross_entropy_rows_apart", "3 16421 16424"),  # long enough for clusters of blocks
    "flat": [
        *table("add_sum", f"{TOKENS}"),
        *table("add_sum_sq", "6888"),
        *table("clip_factor", "1"),
        *table("adamw", "6888"),
        *table("adamw_master", "6888"),
        *table("adamw_first_step", "97"),
    ],
}


CLIPPED = CASE["clip_factor"].fwd.replace("max_norm=0.5", "max_norm=0.05")


NEEDED = {  # rows of faults that those do not show
    "kernel_attention_border_early": table("attention_documents", "2 17 4 2 10 0"),
    "kernel_attention_queries_left_out": table("attention_documents", "2 257 2 1 10 0"),
    "kernel_mma_border_early": table("attention_documents", "2 17 4 2 32 0"),
    "kernel_mma_queries_left_out": table("attention_documents", "2 257 4 2 32 0"),
    "kernel_wgmma_fwd_border_early": table("attention_documents", "2 17 4 2 64 0"),
    "kernel_wgmma_border_early": table("attention_documents", "2 17 4 2 64 0"),
    "kernel_wgmma_queries_left_out": table("attention_documents", "2 257 4 2 64 0"),
    "kernel_attention_rescale_forgotten": table("attention", "1 97 4 2 10"),
    "kernel_mma_sum_of_last_step": table("attention", "1 97 4 2 32"),
    "kernel_embedding_carry_lost": table("embedding", "257 56 1"),
    "kernel_clip_root_forgotten": rows(replace(CASE["clip_factor"], fwd=CLIPPED)),
}


def rows_of(fault: KernelFault) -> list[Row]:
    """The rows in which a fault must show: those that call its op."""
    some = NEEDED.get(fault.name) or SHAPES[fault.module]
    return [row for row in some if fault.op in (op for op, _ in row.calls)]


def wrong_in_bfloat16(be: Backend, row: Row) -> list[str]:
    """Outputs of a row of attention that are off."""
    values = make(row, "bfloat16")
    return off(figures(row, "bfloat16", run(be, row, "bfloat16", values), values, flash()))


def parameters_off(fault: KernelFault, some: Iterable[Row], wrong: Callable[[Row], list[str]]) -> list[str]:
    """The parameters of the fault's op that are off in any of some rows, in their order. wrong: a row's outputs that are"""
    found = set()
    for row in some:
        bad = {name.split()[0] for name in wrong(row)}
        for op, args in row.calls:
            if op == fault.op:
                found |= {p for p, a in zip(OPS[op].parameters, args, strict=True) if a.name in bad}
    return [p for p in OPS[fault.op].parameters if p in found]
