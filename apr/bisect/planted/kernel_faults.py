"""Planted faults of CUDA kernels: the source that is compiled, with one piece of text replaced.

They are what goes wrong in life when kernels are written: a bound that is one off, a factor that is forgotten, a term
that is lost between blocks. Nothing on disk changes: `planted` edits the text on its way to the compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from ...backends.cuda import kernels
from ...model.config import ModelConfig

TENSOR_CORES = kernels.SPECIAL["attention_mma"].defines["HEAD_DIM"]  # head widths of attention_mma
# Head widths of attention_wgmma, which GPUs of sm_90a have.
HOPPER = kernels.SPECIAL["attention_wgmma"].defines["HEAD_DIM"]
BOTH, FLOAT, BF16 = ("float32", "bfloat16"), ("float32",), ("bfloat16",)


@dataclass(frozen=True)
class KernelFault:
    """An edit of a kernel module: every one of `count` occurrences of `old` in its text becomes `new`.

    what: what the edit does. op, output: the op of reference.py that is wrong, and the first of its parameters that is
    wrong in every dtype of `acts`, those in which the tolerance rule sees the edit. applies: the models in which
    it can be seen. needs: what the data must have besides, "" where any 2 x 17 tokens with some targets ignored do.
    """

    name: str
    what: str
    module: str
    old: str
    new: str
    op: str
    output: str
    acts: tuple[str, ...] = BOTH
    applies: Callable[[ModelConfig], bool] = lambda c: True
    needs: str = ""
    count: int = 1

    def edited(self) -> str:
        """The text of the module with the edit. Raises ValueError where `old` is not there `count` times."""
        text = kernels.source(self.module)
        found = text.count(self.old)
        if found != self.count:
            raise ValueError(
                f"{self.name}: {self.module}.cu has {self.old!r} {found} times, not {self.count}; "
                "the kernel has changed: write the fault anew in apr/bisect/planted/kernel_faults.py"
            )
        return text.replace(self.old, self.new)


@contextmanager
def planted(fault: KernelFault) -> Iterator[None]:
    """Every kernel that is loaded inside is compiled from the edited text; what was loaded before is forgotten, and
    afterwards what was loaded inside. A captured step keeps the kernels that it was captured with: make models inside.

    Raises ValueError where the text to replace is not there as often as it should be. Not for several threads.
    """
    text, sound = fault.edited(), kernels.source

    @cache
    def source(module: str) -> str:
        return text if module == fault.module else sound(module)

    try:
        kernels.source = source
        _forget()
        yield
    finally:
        kernels.source = sound
        _forget()


def _forget() -> None:
    """Forget the kernels that this process has loaded. The loader itself is imported only where there is CuPy."""
    launch = sys.modules.get("apr.backends.cuda.launch")
    if launch is not None:
        launch._module.cache_clear()
        launch.kernel.cache_clear()


def _cores(c: ModelConfig) -> bool:
    return c.head_dim not in TENSOR_CORES


def _mma(c: ModelConfig) -> bool:
    return c.head_dim in TENSOR_CORES


def _wgmma(c: ModelConfig) -> bool:
    return c.head_dim in HOPPER


def _grouped(c: ModelConfig) -> bool:
    return c.num_kv_heads < c.num_heads


def _several_groups(c: ModelConfig) -> bool:  # where no mapping of heads is right by chance
    return 1 < c.num_kv_heads < c.num_heads


def _whole_packs(c: ModelConfig) -> bool:  # rows of 16-byte pieces: the _v kernels of add_rmsnorm
    return c.hidden_size % 8 == 0


_HALVES = """\
  x += n / T * x_batch + t * x_row + d;
  Pack<N> a[HEADS], b[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++)
    if (first + h * groups < heads) {
      a[h] = load<N>(x + (first + h * groups) * D);
      b[h] = load<N>(x + (first + h * groups) * D + half);
    }
#pragma unroll
  for (int h = 0; h < HEADS; h++)
    if (first + h * groups < heads) {
      float p[N], q[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        p[j] = a[h][j] * c[j] - b[h][j] * (sign * s[j]);
        q[j] = b[h][j] * c[j] + a[h][j] * (sign * s[j]);
      }
      store(x + (first + h * groups) * D, rounded(p));
      store(x + (first + h * groups) * D + half, rounded(q));
    }
"""

_CATALOGUE = (
    # Matrices under adapters
    KernelFault(
        "kernel_adapted_neighbour_row",
        "a row of 8-bit integers gets the factor of the row before it",
        *("adapted", "row[first + o] : 1.f", "row[max(0, first + o - 1)] : 1.f"),
        *("adapted_int8", "out"),
        applies=lambda c: False,
        needs="adapters over 8-bit integers",
    ),
    KernelFault(
        "kernel_adapted_factor_forgotten",
        "the product of the adapters lacks their factor",
        *("adapted", "x[j] += factor * sum[o][j];", "x[j] += sum[o][j];"),
        *("adapted", "out"),
        applies=lambda c: False,
        needs="adapters",
    ),
    KernelFault(
        "kernel_adapted_last_rank_lost",
        "the last of the ranks of an adapter is left out",
        *("adapted", "for (int r = 0; r < ranks; r++) {", "for (int r = 0; r + 1 < ranks; r++) {"),
        *("adapted", "out"),
        applies=lambda c: False,
        needs="adapters",
    ),
    # Dropout
    KernelFault(
        "kernel_dropout_one_word_for_four",
        "neighbours are dropped together: one of four random words serves them all",
        *("dropout", "N > 1 ? drawn.w[i]", "N > 1 ? drawn.w[0]"),
        *("dropout", "out"),
        applies=lambda c: False,
        needs="adapters with dropout",
    ),
    KernelFault(
        "kernel_dropout_module_ignored",
        "all modules have one mask",
        *("dropout", "(unsigned)module, number", "0u, number"),
        *("dropout", "out"),
        applies=lambda c: False,
        needs="adapters with dropout",
    ),
    KernelFault(
        "kernel_dropout_step_ignored",
        "every step has the same mask",
        *("dropout", "number, step}}", "number, 0u}}"),
        *("dropout", "out"),
        applies=lambda c: False,
        needs="adapters with dropout",
    ),
    KernelFault(
        "kernel_dropout_first_sequence_for_all",
        "all sequences have the mask of the first",
        *("dropout", "counters[2 * b],", "counters[0],"),
        *("dropout", "out"),
        applies=lambda c: False,
        needs="adapters with dropout",
    ),
    KernelFault(
        "kernel_dropout_scale_forgotten",
        "what is kept is not scaled",
        *("dropout", "in[first + i] * scale", "in[first + i]"),
        *("dropout", "out"),
        applies=lambda c: False,
        needs="adapters with dropout",
    ),
    KernelFault(
        "kernel_adapted_few_last_rank_lost",
        "the last of few ranks of an adapter is left out",
        *("adapted", "t % FEW < R ?", "t % FEW < R - 1 ?"),
        *("adapted", "out"),
        applies=lambda c: False,
        needs="adapters",
    ),
    KernelFault(
        "kernel_low_rank_factor_forgotten",
        "the gradient of A lacks the factor of the adapters",
        *("low_rank", "+= factor * all[k];", "+= all[k];"),
        *("adapted_bwd_a", "da"),
        acts=BF16,
        applies=lambda c: False,
        needs="adapters",
    ),
    KernelFault(
        "kernel_low_rank_last_warp_lost",
        "what the last warp of a block has of du is left out",
        *("low_rank", "for (int w = 0; w < WARPS; w++)", "for (int w = 0; w < WARPS - 1; w++)"),
        *("adapted_bwd_b", "du"),
        acts=BF16,
        applies=lambda c: False,
        needs="adapters",
    ),
    KernelFault(
        "kernel_low_rank_rows_not_turned",
        "the gradient of B takes u for u^T within tiles of 8 x 8",
        *("low_rank", "= transposed(next[i].l[k]);", "= next[i].l[k];"),
        *("adapted_bwd_b", "db"),
        acts=BF16,
        applies=lambda c: False,
        needs="adapters",
    ),
    # Norms
    KernelFault(
        "kernel_norm_eps_constant",
        "eps of the norms is 1e-5, whatever the config says",
        *("norm", "sqrtf(sum / n + eps)", "sqrtf(sum / n + 1e-5f)"),
        *("add_rmsnorm_fwd", "y"),
        acts=FLOAT,
        applies=lambda c: c.rms_norm_eps != 1e-5,
    ),
    KernelFault(
        "kernel_norm_eps_forgotten",
        "rstd is the root of the mean alone, without eps",
        *("norm", "sqrtf(sum / n + eps)", "sqrtf(sum / n)"),
        *("add_rmsnorm_fwd", "y"),
        acts=FLOAT,
        needs="residuals whose mean square is not far above 1, as in a model that has learnt little",
    ),
    KernelFault(
        "kernel_norm_scaled",
        "what the norms give is 0.1 % too large",
        *("norm", "out[i] = x[k][i] * r * weight[i];", "out[i] = x[k][i] * r * weight[i] * 1.001f;"),
        *("add_rmsnorm_fwd", "y"),
        acts=FLOAT,
        applies=_whole_packs,
    ),
    KernelFault(
        "kernel_residual_dropped",
        "the residual stream is what the last block gave, without what came before",
        *("norm", "sum[i] = x[k][i] + d[k][i];", "sum[i] = d[k][i];"),
        *("add_rmsnorm_fwd", "res"),
        applies=_whole_packs,
    ),
    KernelFault(
        "kernel_residual_not_stored",
        "the sum of residual and block goes into the norm, but not into the residual stream",
        *("norm", "(delta || res != res_in)) store(res + at + c, x[k]);"),
        "(delta || res != res_in)) store(res + at + c, load<N>(res_in + at + c));",
        *("add_rmsnorm_fwd", "res"),
        applies=_whole_packs,
    ),
    KernelFault(
        "kernel_norm_bwd_projection_dropped",
        "the gradient through a norm lacks the term that comes from rstd",
        *("norm", "r * (up[k][i] * weight[i] - xhat * mean)", "r * (up[k][i] * weight[i])"),
        *("add_rmsnorm_bwd", "dres"),
        applies=_whole_packs,
    ),
    KernelFault(
        "kernel_norm_bwd_dres_overwritten",
        "the gradient of the residual stream is replaced by that through the norm, not added to",
        *("norm", "if constexpr (OLD) out[i] += old[k][i];", ""),
        *("add_rmsnorm_bwd", "dres"),
        applies=_whole_packs,
        needs="a dres that is not zero: not the one of the final norm",
    ),
    KernelFault(
        "kernel_norm_dw_without_rstd",
        "the gradient of a norm's weights is summed over dy * x in place of dy * xhat",
        *("norm", "dw[k][i] += up[k][i] * xhat;", "dw[k][i] += up[k][i] * held[k][i];"),
        *("add_rmsnorm_bwd", "dw"),
        applies=_whole_packs,
    ),
    KernelFault(
        "kernel_norm_dw_last_block_lost",
        "the gradient of a norm's weights lacks the rows of the last block",
        *("norm", "p < parts; p += 32", "p < parts - 1; p += 32"),
        *("add_rmsnorm_bwd", "dw"),
    ),
    KernelFault(
        "kernel_head_norm_first_head",
        "the norm over heads reads the first head in place of each",
        *("norm", "load<N>(x + n * x_row + h * D + c)", "load<N>(x + n * x_row + c)"),
        *("head_rmsnorm_fwd", "y"),
        applies=lambda c: c.qk_norm,
    ),
    KernelFault(
        "kernel_head_norm_bwd_first_rstd",
        "the gradient through the norm over heads takes the rstd of the first head for each",
        *("norm", "live ? rstd[n * rstd_row + h] : 0", "live ? rstd[n * rstd_row] : 0"),
        *("head_rmsnorm_bwd", "dx"),
        applies=lambda c: c.qk_norm,
    ),
    # Positions
    KernelFault(
        "kernel_rope_neighbours_paired",
        "pairs are neighbours (packs, where 16 bytes are moved at once), not halves of a head",
        *("rope", _HALVES, _HALVES.replace("x_row + d;", "x_row + 2 * d;").replace("+ half", "+ N")),
        *("rope", "x"),
        applies=lambda c: c.head_dim > 16,  # half a head is more than one pack
    ),
    KernelFault(
        "kernel_rope_position_before",
        "a position is turned by the angle of the one before",
        *("rope", "(long long)t * half + d", "(long long)(t ? t - 1 : 0) * half + d"),
        *("rope", "x"),
        count=2,
    ),
    KernelFault(
        "kernel_rope_sign_ignored",
        "backward turns forward again",
        *("rope", "(sign * s[j])", "s[j]"),
        *("rope", "x"),
        count=2,
    ),
    # Attention on CUDA cores
    KernelFault(
        "kernel_attention_mask_late",
        "a query sees one key after itself",
        *("attention", "j <= t + offset &&", "j <= t + offset + 1 &&"),
        *("attention_fwd", "y"),
        applies=_cores,
    ),
    KernelFault(
        "kernel_attention_window_wide",
        "a query sees one key before its window",
        *("attention", "j > t + offset - window", "j >= t + offset - window"),
        *("attention_fwd", "y"),
        applies=lambda c: _cores(c) and c.sliding_window > 0,
        needs="more positions than sliding_window",
    ),
    KernelFault(
        "kernel_attention_heads_interleaved",
        "query head h reads kv head h % K, not h / (H/K)",
        *("attention", "kv = h / (H / K)", "kv = h % K"),
        *("attention_fwd", "y"),
        applies=lambda c: _cores(c) and _several_groups(c),
        count=2,
    ),
    KernelFault(
        "kernel_attention_scale_missing",
        "scores of forward are not divided by sqrt(D)",
        *("attention", "seen ? p[i][j] * scale : __uint", "seen ? p[i][j] : __uint"),
        *("attention_fwd", "y"),
        applies=_cores,
    ),
    KernelFault(
        "kernel_attention_rescale_forgotten",
        "what was summed under a smaller maximum is not scaled down when the maximum grows",
        *("attention", "out[i][u][e] *= shrink;", ";"),
        *("attention_fwd", "y"),
        applies=_cores,
        needs="more than 64 positions (32 with heads above 64, 16 above 128): several tiles of keys",
    ),
    KernelFault(
        "kernel_attention_dq_delta_forgotten",
        "dq lacks the term that comes from the sum of the softmax",
        *("attention", "(ds[i][j] - row_delta[i])", "ds[i][j]"),
        *("attention_bwd", "dq"),
        applies=_cores,
    ),
    KernelFault(
        "kernel_attention_dkv_last_head_lost",
        "dk and dv lack the last of the query heads that share a kv head",
        *("attention", "h < (kv + 1) * group; h++", "h < (kv + 1) * group - 1; h++"),
        *("attention_bwd", "dk"),
        applies=lambda c: _cores(c) and _grouped(c),
    ),
    KernelFault(
        "kernel_attention_border_early",
        "a query sees the last key of the document before its own",
        *("attention", "key >= begin[i] &&", "key >= begin[i] - 1 &&"),
        *("attention_fwd", "y"),
        applies=_cores,
        needs="several documents in a sequence",
        count=2,
    ),
    KernelFault(
        "kernel_attention_queries_left_out",
        "dk and dv lack the tiles of queries whose first document begins inside the tile of keys",
        *("attention", "document(doc_start, t0) < own + TILE;", "document(doc_start, t0) <= own;"),
        *("attention_bwd", "dk"),
        applies=_cores,
        needs="several documents in a sequence, more than 64 positions (32 with heads above 64, 16 above 128)",
    ),
    # Attention on tensor cores
    KernelFault(
        "kernel_mma_mask_late",
        "a query sees one key after itself, unless that begins a step of keys",
        *("attention_mma", "if (j > ahead ||", "if (j > ahead + 1 ||"),
        *("attention_fwd", "y"),
        acts=BF16,
        applies=_mma,
    ),
    KernelFault(
        "kernel_mma_window_wide",
        "a query sees one key before its window, unless that ends a step of keys",
        *("attention_mma", "(window && j <= ahead - window)", "(window && j < ahead - window)"),
        *("attention_fwd", "y"),
        acts=BF16,
        applies=lambda c: _mma(c) and c.sliding_window > 0,
        needs="more positions than sliding_window",
    ),
    KernelFault(
        "kernel_mma_heads_interleaved",
        "query head h reads kv head h % K, not h / (H/K)",
        *(
            "attention_mma",
            "head = at.kv * (H / K) + at.part, t_block",
            "head = at.part * K + at.kv, t_block",
        ),
        *("attention_fwd", "y"),
        acts=BF16,
        applies=lambda c: _mma(c) and _several_groups(c),
        count=2,
    ),
    KernelFault(
        "kernel_mma_scale_missing",
        "scores are not divided by sqrt(D), in forward and backward",
        *("attention_mma", "const float c = scale * LOG2E;", "const float c = LOG2E;"),
        *("attention_fwd", "y"),
        acts=BF16,
        applies=_mma,
        count=3,
    ),
    KernelFault(
        "kernel_mma_sum_of_last_step",
        "values are divided by the sum of exponentials of the last step of keys alone",
        *("attention_mma", "sum[i][0] += part[i][0], sum[i][1] += part[i][1];"),
        "sum[i][0] = part[i][0], sum[i][1] = part[i][1];",
        *("attention_fwd", "y"),
        acts=BF16,
        applies=_mma,
        needs="more than 64 positions (32 with heads of 128): several steps of keys",
    ),
    KernelFault(
        "kernel_mma_lse_in_powers_of_two",
        "lse is a logarithm to base 2",
        *("attention_mma", "lse[t] = (top[i][half] + log2f(total)) * LN2;"),
        "lse[t] = top[i][half] + log2f(total);",
        *("attention_fwd", "lse"),
        acts=BF16,
        applies=_mma,
    ),
    KernelFault(
        "kernel_mma_dq_delta_forgotten",
        "dq lacks the term that comes from the sum of the softmax",
        *("attention_mma", "(ds[i][n][e] - delta[i][e / 2])", "ds[i][n][e]"),
        *("attention_bwd", "dq"),
        acts=BF16,
        applies=_mma,
    ),
    KernelFault(
        "kernel_mma_dq_scale_missing",
        "dq is not divided by sqrt(D)",
        *("attention_mma", "delta[i][0] = delta[i][1] = scale;", "delta[i][0] = delta[i][1] = 1;"),
        *("attention_bwd", "dq"),
        acts=BF16,
        applies=_mma,
    ),
    KernelFault(
        "kernel_mma_dkv_last_head_lost",
        "dk and dv lack the last query head of each block that adds up heads",
        *("attention_mma", "+ (at.part + 1) * (H / K) / splits;", "+ (at.part + 1) * (H / K) / splits - 1;"),
        *("attention_bwd", "dk"),
        acts=BF16,
        applies=_mma,
    ),
    KernelFault(
        "kernel_mma_border_early",
        "a query sees the last key of the document before its own, unless that ends a step of keys",
        *("attention_mma", "if (n * 8 + odd < hidden)", "if (n * 8 + odd + 1 < hidden)"),
        *("attention_fwd", "y"),
        acts=BF16,
        applies=_mma,
        needs="several documents in a sequence",
    ),
    KernelFault(
        "kernel_mma_queries_left_out",
        "dk and dv lack the stages of queries whose first document begins inside the block of keys",
        *("attention_mma", "DKV_STAGE) < j_block + DKV_ROWS);", "DKV_STAGE) <= j_block);"),
        *("attention_bwd", "dk"),
        acts=BF16,
        applies=_mma,
        needs="several documents in a sequence, more than 64 positions",
    ),
    # Attention on wgmma
    KernelFault(
        "kernel_wgmma_fwd_mask_late",
        "a query sees one key after itself, unless that begins a step of keys",
        *("attention_wgmma", "if (i / 4 * 8 + e > to ||", "if (i / 4 * 8 + e > to + 1 ||"),
        *("attention_fwd", "y"),
        acts=BF16,
        applies=_wgmma,
    ),
    KernelFault(
        "kernel_wgmma_fwd_window_wide",
        "a query sees one key before its window, unless that ends a step of keys",
        *("attention_wgmma", "i / 4 * 8 + e < from)", "i / 4 * 8 + e + 1 < from)"),
        *("attention_fwd", "y"),
        acts=BF16,
        applies=lambda c: _wgmma(c) and c.sliding_window > 0,
        needs="more positions than sliding_window",
    ),
    KernelFault(
        "kernel_wgmma_fwd_heads_interleaved",
        "query head h reads kv head h % K, not h / (H/K)",
        *("attention_wgmma", "kv = at.pair % H / (H / K);", "kv = at.pair % H % K;"),
        *("attention_fwd", "y"),
        acts=BF16,
        applies=lambda c: _wgmma(c) and _several_groups(c),
    ),
    KernelFault(
        "kernel_wgmma_fwd_scale_missing",
        "scores are not divided by sqrt(D)",
        *("attention_wgmma", "c = scale * LOG2E;  // scores are kept", "c = LOG2E;  // scores are kept"),
        *("attention_fwd", "y"),
        acts=BF16,
        applies=_wgmma,
    ),
    KernelFault(
        "kernel_wgmma_fwd_lse_in_powers_of_two",
        "lse is a logarithm to base 2",
        *("attention_wgmma", "(top[h] + log2f(total)) * LN2;", "top[h] + log2f(total);"),
        *("attention_fwd", "lse"),
        acts=BF16,
        applies=_wgmma,
    ),
    KernelFault(
        "kernel_wgmma_fwd_border_early",
        "a query sees the last key of the document before its own",
        *("attention_wgmma", "max(first, Borders{doc_start, batch, T}.at(t))"),
        "max(first, Borders{doc_start, batch, T}.at(t) - 1)",
        *("attention_fwd", "y"),
        acts=BF16,
        applies=_wgmma,
        needs="several documents in a sequence",
    ),
    KernelFault(
        "kernel_wgmma_mask_late",
        "in backward a query sees one key after itself, unless that begins a step of keys",
        *("attention_wgmma", "if (j > ahead ||", "if (j > ahead + 1 ||"),
        *("attention_bwd", "dq"),
        acts=BF16,
        applies=_wgmma,
    ),
    KernelFault(
        "kernel_wgmma_window_wide",
        "in backward a query sees one key before its window, unless that ends a step of keys",
        *("attention_wgmma", "(window && j <= ahead - window)", "(window && j < ahead - window)"),
        *("attention_bwd", "dq"),
        acts=BF16,
        applies=lambda c: _wgmma(c) and c.sliding_window > 0,
        needs="more positions than sliding_window",
    ),
    KernelFault(
        "kernel_wgmma_dq_heads_interleaved",
        "for dq, query head h reads kv head h % K, not h / (H/K)",
        *("attention_wgmma", "head / (H / K)", "head % K"),
        *("attention_bwd", "dq"),
        acts=BF16,
        applies=lambda c: _wgmma(c) and _several_groups(c),
        count=2,
    ),
    KernelFault(
        "kernel_wgmma_dq_delta_forgotten",
        "dq lacks the term that comes from the sum of the softmax",
        *("attention_wgmma", "p[e] *= dp[e] - delta[e / 2 % 2];", "p[e] *= dp[e];"),
        *("attention_bwd", "dq"),
        acts=BF16,
        applies=_wgmma,
    ),
    KernelFault(
        "kernel_wgmma_dq_scale_missing",
        "dq is not divided by sqrt(D)",
        *(
            "attention_wgmma",
            "rows_put(result, DQ_QUERIES, sum, scale);",
            "rows_put(result, DQ_QUERIES, sum, 1);",
        ),
        *("attention_bwd", "dq"),
        acts=BF16,
        applies=_wgmma,
    ),
    KernelFault(
        "kernel_wgmma_dkv_last_step_lost",
        "dk and dv lack the last step of queries of each block that shares them",
        *("attention_wgmma", "last = (part + 1) * each * count / splits;"),
        "last = max(0, (part + 1) * each * count / splits - 1);",
        *("attention_bwd", "dk"),
        acts=BF16,
        applies=_wgmma,
        count=2,
    ),
    KernelFault(
        "kernel_wgmma_dkv_delta_of_neighbour",
        "dk takes the sum of the softmax of each odd query from the even one before it",
        *("attention_wgmma", "__uint_as_float(e % 2 ? x.w : x.y)", "__uint_as_float(x.y)"),
        *("attention_bwd", "dk"),
        acts=BF16,
        applies=_wgmma,
    ),
    KernelFault(
        "kernel_wgmma_border_early",
        "in dk and dv a query sees the last key of the document before its own",
        *("attention_wgmma", "% 2 * 8 < borders.at(t_now + e / 4", "% 2 * 8 + 1 < borders.at(t_now + e / 4"),
        *("attention_bwd", "dk"),
        acts=BF16,
        applies=_wgmma,
        needs="several documents in a sequence",
    ),
    KernelFault(
        "kernel_wgmma_queries_left_out",
        "dk and dv lack the steps of queries whose first document begins inside the tile of keys",
        *("attention_wgmma", "DKV_QUERIES) < j + DKV_KEYS));", "DKV_QUERIES) <= j));"),
        *("attention_bwd", "dk"),
        acts=BF16,
        applies=_wgmma,
        needs="several documents in a sequence, more than 64 positions",
    ),
    # MLP
    KernelFault(
        "kernel_swiglu_swapped",
        "the gate is taken for the value and the value for the gate",
        *("swiglu", "gate[i] * sigmoid(gate[i]) * up[i]", "up[i] * sigmoid(up[i]) * gate[i]"),
        *("swiglu_fwd", "y"),
    ),
    KernelFault(
        "kernel_swiglu_bwd_factor_missing",
        "the gradient of the gate is that of a sigmoid times a constant: a factor is missing",
        *("swiglu", "up[i] * s * (1.f + gate[i] * (1.f - s));", "up[i] * s;"),
        *("swiglu_bwd", "dgu"),
    ),
    KernelFault(
        "kernel_swiglu_bwd_scaled",
        "the gradient of the value is 0.1 % too large",
        *("swiglu", "dup[i] = d[i] * gate[i] * s;", "dup[i] = d[i] * gate[i] * s * 1.001f;"),
        *("swiglu_bwd", "dgu"),
        acts=FLOAT,
    ),
    # Embedding and biases
    KernelFault(
        "kernel_embedding_token_before",
        "a token gets the row of the one before it",
        *("embedding", "(long long)ids[n] * C;", "(long long)ids[n ? n - 1 : 0] * C;"),
        *("embedding_fwd", "y"),
    ),
    KernelFault(
        "kernel_embedding_repeats_once",
        "of an id that occurs several times only the last occurrence has a gradient",
        *("embedding", "sum[i] += x[i];", "sum[i] = x[i];"),
        *("embedding_bwd", "dw"),
        needs="an id that occurs several times",
    ),
    KernelFault(
        "kernel_embedding_carry_lost",
        "an id that lies in several tiles of 32 sorted tokens has the gradient of the first alone",
        *("embedding", "sum += carry[(long long)++tile * 2 * C + c];", "++tile;"),
        *("embedding_bwd", "dw"),
        needs="an id that occurs more than 32 times",
    ),
    KernelFault(
        "kernel_bias_last_part_lost",
        "the gradient of a bias lacks the last part of the rows",
        *("bias", "p < parts; p += 32", "p < parts - 1; p += 32"),
        *("linear_bwd", "db"),
        applies=lambda c: c.qkv_bias,
    ),
    # Loss
    KernelFault(
        "kernel_loss_scaled",
        "the loss is 0.1 % too large",
        *("loss", "loss[n] = logf(s.sum) + (s.top - at_target);"),
        "loss[n] = (logf(s.sum) + (s.top - at_target)) * 1.001f;",
        *("cross_entropy", "loss"),
    ),
    KernelFault(
        "kernel_loss_target_unscaled",
        "at the target 1 is subtracted from the gradient, not scale",
        *("loss", "d[j] -= scale;", "d[j] -= 1;"),
        *("cross_entropy", "logits"),
    ),
    KernelFault(
        "kernel_loss_gradient_unscaled",
        "the part of the gradient that comes from the softmax is not scaled",
        *("loss", "share = scale * (1 +", "share = (1 +"),
        *("cross_entropy", "logits"),
    ),
    KernelFault(
        "kernel_loss_ignored_counted",
        "a target that is to be ignored counts as token 0",
        *("loss", "target = targets[n], packs", "target = max(targets[n], 0), packs"),
        *("cross_entropy", "loss"),
    ),
    KernelFault(
        "kernel_loss_tail_not_summed",
        "the sum of exponentials lacks the last columns of the vocabulary, those after whole packs",
        *("loss", "if (tail < V) s.join(to_float(x[tail]), 1);", ""),
        *("cross_entropy", "loss"),
        applies=lambda c: c.vocab_size % 4 != 0,
    ),
    KernelFault(
        "kernel_cluster_last_block_lost",
        "the sum of exponentials of a long row lacks the part that the last block of a cluster has",
        *("loss_cluster", "b < BLOCKS; b++", "b < BLOCKS - 1; b++"),
        *("cross_entropy", "loss"),
        applies=lambda c: c.vocab_size >= 16384,
    ),
    # Optimizer
    KernelFault(
        "kernel_sum_last_part_lost",
        "sums lack what the last block has added up",
        *("flat", "blockDim.x < parts ? partial", "blockDim.x < parts - 1 ? partial"),
        *("add_sum", "total"),
    ),
    KernelFault(
        "kernel_sum_sq_scaled",
        "the sum of squares is 0.1 % too large",
        *(
            "flat",
            "total += (double)v[j] * v[j];",
            "total += (double)v[j] * v[j] * 1.001;",
        ),
        *("add_sum_sq", "total"),
    ),
    KernelFault(
        "kernel_sum_tail_lost",
        "sums lack the elements after whole packs",
        *("flat", "if (rest < n) total +=", "if (rest < 0) total +="),
        *("add_sum", "total"),
        needs="a length that is no multiple of 4",
    ),
    KernelFault(
        "kernel_clip_root_forgotten",
        "gradients are clipped by the square of their norm",
        *("flat", "max_norm_rest) / (sqrt(sum_sq[0]) + 1e-6)", "max_norm_rest) / (sum_sq[0] + 1e-6)"),
        *("clip_factor", "factor"),
        needs="a squared norm of gradients, not 1, above max_norm",
    ),
    KernelFault(
        "kernel_adamw_decay_forgotten",
        "weights do not decay",
        *("flat", "sqrtf(v / bias2) + eps) + decay * master)", "sqrtf(v / bias2) + eps))"),
        *("adamw", "w"),
        acts=FLOAT,
        needs="a weight decay above 0",
    ),
    KernelFault(
        "kernel_adamw_bias2_forgotten",
        "the second moment is not corrected for its start at zero",
        *("flat", "sqrtf(v / bias2)", "sqrtf(v)"),
        *("adamw", "w"),
        acts=FLOAT,
        needs="one of the first steps",
    ),
    KernelFault(
        "kernel_adamw_eps_inside_root",
        "eps of AdamW is added before the root is taken",
        *("flat", "(sqrtf(v / bias2) + eps)", "sqrtf(v / bias2 + eps)"),
        *("adamw", "w"),
        acts=FLOAT,
        needs="gradients whose square is not far above eps, as in a model that has just begun",
    ),
    KernelFault(
        "kernel_adamw_factor_forgotten",
        "the factor that clips gradients is not applied",
        *("flat", "g *= factor;", ""),
        *("adamw", "w"),
        acts=FLOAT,
        needs="a factor below 1: gradients beyond max_norm",
    ),
    KernelFault(
        "kernel_adamw_weights_stale",
        "the copy of the weights that AdamW updates is not rounded back to the weights",
        *("flat", "if (own) store(w + i, rounded(a));", ""),
        *("adamw", "w"),
        acts=BF16,
        needs="a learning rate that moves weights by a percent or more",
    ),
)

KERNEL_FAULTS: dict[str, KernelFault] = {fault.name: fault for fault in _CATALOGUE}
