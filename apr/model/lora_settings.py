"""Read what flags say of adapters, and refuse what a model cannot have."""

from __future__ import annotations

import dataclasses
import math

from ..common.errors import UsageError
from ..common.patterns import compiled_end
from .config import ModelConfig
from .lora import (
    ALPHA_PER_RANK,
    LINEAR,
    OUTSIDE,
    SHORT,
    TARGETS,
    AdapterLayout,
    LoraConfig,
    adapted_in,
    matches,
    module_of,
)
from .params import Layout


def lora_config(
    rank: int | None,
    alpha: float | None,
    targets: str | None,
    base: str | None = None,
    rslora: bool = False,
    ranks: str | None = None,
    alphas: str | None = None,
    saved: str | None = None,
    embeddings: bool = False,
    dora: bool = False,
    dropout: float | None = None,
) -> LoraConfig | None:
    """Build a LoraConfig from flags; ranks, alphas: patterns; embeddings: they and the head are among the saved modules.

    None without a rank. Raises UsageError."""
    if rank is None:
        if (
            rslora
            or embeddings
            or dora
            or any(x is not None for x in (alpha, targets, base, ranks, alphas, saved, dropout))
        ):
            raise UsageError(
                "--lora-alpha, --lora-targets, --lora-base, --lora-rslora, --lora-dora, --lora-dropout, "
                "--lora-modules-to-save, --train-embeddings and patterns are about adapters: give --lora-rank too"
            )
        return None
    return LoraConfig(
        rank,
        ALPHA_PER_RANK * rank if alpha is None else alpha,
        parse_targets(targets),
        rslora,
        base,
        tuple((p, int(n)) for p, n in parse_pattern("--lora-rank-pattern", ranks, whole=True)),
        tuple(parse_pattern("--lora-alpha-pattern", alphas)),
        parse_saved(saved, embeddings),
        dora,
        dropout or 0.0,
    )


def parse_saved(text: str | None, embeddings: bool) -> tuple[str, ...]:
    """Parse "embed_tokens,norm" into ends of names; embeddings: those of the embedding and of the head too. Raises UsageError."""
    given = [part for part in (text or "").replace(",", " ").split() if part]
    if text is not None and not given:
        raise UsageError("--lora-modules-to-save: empty; name modules such as embed_tokens, lm_head, norm")
    return tuple(dict.fromkeys([*(OUTSIDE.values() if embeddings else ()), *given]))


def parse_pattern(name: str, text: str | None, whole: bool = False) -> list[tuple[str, float]]:
    """Parse "q_proj=4,layers.0.mlp.*=8" into patterns and numbers. Raises UsageError."""
    found = []
    for part in filter(None, (p.strip() for p in (text or "").split(","))):
        pattern, _, number = part.rpartition("=")
        try:
            value = float(number)
            compiled_end(pattern)
        except ValueError as e:
            raise UsageError(f"{name} {part!r}: write PATTERN=NUMBER, such as q_proj=4 ({e})") from None
        if not pattern or not 0 < value < math.inf or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise UsageError(f"{name} {part!r}: write PATTERN=NUMBER with {kind} above 0, such as q_proj=4")
        found.append((pattern, value))
    return found


def check_saved(cfg: ModelConfig, config: LoraConfig, name: str = "--lora-modules-to-save") -> None:
    """Raise UsageError for a module to train whole that the model does not have, is adapted too, or is a map of a block."""
    layout, adapted = Layout(cfg), adapted_in(cfg, config)
    modules = {module_of(s.hf): s for s in layout.slots}
    # A head that is the embedding is named as one that is not.
    tied = {"lm_head": layout.by_hf["model.embed_tokens.weight"]} if cfg.tie_word_embeddings else {}
    for end in config.saved:
        found = [(module, s) for module, s in (modules | tied).items() if module.endswith(end)]
        if not found:
            raise UsageError(
                f"{name} {end!r} matches no module of the model; there are embed_tokens, lm_head, norm, input_layernorm and so on"
            )
        for module, s in found:
            if s.param.name in LINEAR or s.param.name[0] == "b":
                raise UsageError(
                    f"{name} {end!r} matches {module}, a linear map of the blocks; whole copies are of embedding, head and "
                    "norms: adapt it with --lora-targets, or train all weights without --lora-rank"
                )
            if s.param.name in adapted:
                raise UsageError(
                    f"{name} {end!r}: {module} is adapted by --lora-targets; train it whole or adapt it"
                )


def check_dora(config: LoraConfig) -> None:
    """Raise UsageError for norms of rows that are not trained: of 8-bit integers, of embedding and head, under dropout."""
    if config.dora and config.dropout:
        raise UsageError(
            f"--lora-dora and --lora-dropout {config.dropout:g}: norms of rows are trained without dropout only; give "
            "--lora-dropout 0, or leave --lora-dora out"
        )
    if config.dora and config.base:
        raise UsageError(
            "--lora-dora and --lora-base int8: norms of rows of 8-bit integers are not trained; leave one out"
        )
    if config.dora and (outside := [TARGETS[t] for t in config.targets if t in OUTSIDE]):
        raise UsageError(
            f"--lora-dora is of linear maps of the blocks, not of {outside[0]}; leave it out of --lora-targets, or train it "
            "whole with --train-embeddings"
        )


def check_rank(cfg: ModelConfig, config: LoraConfig) -> None:
    """Raise UsageError for a rank that no adapted matrix can use, above the smaller side of each, and for a pattern that
    matches no adapted matrix; and as check_saved and check_dora do."""
    check_saved(cfg, config)
    check_dora(config)
    plain = dataclasses.replace(config, rank=1, rank_pattern=(), alpha_pattern=())
    sides = {pair.module: min(pair.base.shape) for pair in AdapterLayout(cfg, plain).pairs}
    for name, patterns in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern)):
        for pattern, _ in patterns:
            if not any(matches(pattern, module) for module in sides):
                example = next(iter(sides), "")
                raise UsageError(
                    f"--lora-{name}-pattern {pattern!r} matches no adapted matrix; their names end like {example!r}, and "
                    f"--lora-targets says which are adapted"
                )
    for module, side in sides.items():
        if config.rank_of(module) > side and config.rank_pattern:
            raise UsageError(
                f"--lora-rank-pattern: rank {config.rank_of(module)} of {module}, whose smaller side is {side}"
            )
    most = max(sides.values(), default=config.rank)
    if config.rank > most:
        raise UsageError(
            f"--lora-rank {config.rank}: the adapted matrices have at most {most} rows or columns, and a higher rank adds "
            f"nothing; give at most {most}, usual are 8 to 64"
        )


def parse_targets(text: str | None) -> tuple[str, ...]:
    """Parse "q,v", "q_proj,v_proj" or "all-linear" (None) into names of the parameter table. Raises UsageError."""
    if text is None or text == "all-linear":
        return tuple(LINEAR)
    known = {**SHORT, **{name: name for name in OUTSIDE}, **{peft: name for name, peft in TARGETS.items()}}
    given = [part for part in text.replace(",", " ").split() if part]
    if "all-linear" in given:
        given = [*SHORT, *(part for part in given if part != "all-linear")]
    for part in given:
        if part not in known:
            raise UsageError(
                f"--lora-targets {part}: not one of {', '.join([*SHORT, *OUTSIDE])} (or {', '.join(TARGETS.values())}, or "
                "all-linear, which leaves embedding and head out)"
            )
    if not given:
        raise UsageError("--lora-targets: empty; leave it out to adapt all linear maps of the blocks")
    return tuple(name for name in TARGETS if name in {known[part] for part in given})
