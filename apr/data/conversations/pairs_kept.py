"""Compare chosen and rejected tokens of packed pairs with the answers of the files, read again by other code."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np

from ...common.finding import Finding
from ...common.units import plural
from ...tokenizer.chat_template import ChatTemplate
from ...tokenizer.tokenizer import Tokenizer
from ..plain import Unfollowed, records
from .answers import BUDGET_BYTES, Frame, Spelling, contents, sampled_rows
from .packed import PackedShards
from .pairs import CHOSEN, REJECTED, SEAM_TOKENS, Pairs

PAIRS, PAIRS_BOUND = (
    "pairs of the files",
    "chosen answers are chosen ones of the files, rejected are rejected ones",
)


def pairs_kept(
    corpus: Pairs, sides: dict[str, PackedShards], tokenizer: Tokenizer, template: ChatTemplate | None
) -> Finding:
    """Compare trained tokens of pairs with chosen and rejected answers of the files: each kind with its own."""
    spelling, found = Spelling(tokenizer), Counter[str]()
    frame = Frame.of(template, tokenizer)
    # What the template writes around an answer, where it is no special token: a key has none of those.
    before, behind = (spelling.key(part) for part in ((frame.before, frame.behind) if frame else ("", "")))
    answers: dict[int, set[str]] = {CHOSEN: set(), REJECTED: set()}
    count = 0
    try:
        for source in corpus.sources:
            for _, value in records(source, BUDGET_BYTES):
                count += 1
                value = corpus.map(value) if isinstance(value, dict) else value
                for label, key in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
                    said = value.get(key) if isinstance(value, dict) else None
                    turns = (
                        said
                        if isinstance(said, list)
                        else [said if isinstance(said, dict) else {"content": said}]
                    )
                    if isinstance(said, str) and said.lstrip().startswith("Human:") and "prompt" not in value:
                        turns = [{"content": said.rpartition("\n\nAssistant:")[2]}]
                    texts = (t for m in turns[-1:] if isinstance(m, dict) for t in contents(m, {}))
                    answers[label].update(k for t in texts for k in spelling.keys(t))
    except Unfollowed:
        return Finding.skipped(PAIRS, "the files are longer than a check reads", PAIRS_BOUND)
    for shards in sides.values():
        for row in sampled_rows(shards):
            ids, labels = np.asarray(shards.ids[row]).astype(np.int64), np.asarray(shards.trained[row])
            edges = np.flatnonzero(np.diff(np.concatenate([[0], labels, [0]]).astype(np.int8)))
            for first, last in pairwise(edges.tolist()):
                if not labels[first]:
                    continue
                text = spelling.key(tokenizer.decode(ids[first:last])).removesuffix(behind)
                own = int(labels[first])
                # The first tokens may hold the end of the prompt.
                seam = len(spelling.key(tokenizer.decode(ids[first : min(last, first + SEAM_TOKENS)])))
                parts = [text.removeprefix(before), *(text[i:] for i in range(max(2, seam)))]
                kinds = [k for k in answers if any(part in answers[k] for part in parts)]
                found["own" if own in kinds else "other" if kinds else "none"] += 1
    total = sum(found.values())
    measured = f"{found['own']:,} of {plural(total, 'sampled answer')} found in {plural(count, 'record')}"
    wrong = f"; {found['other']:,} are answers of the other kind" if found["other"] > 0.05 * total else ""
    wrong += f"; {found['none']:,} are no answers of the files" if found["none"] > 0.5 * total else ""
    return Finding.of(PAIRS, not wrong, measured + wrong, PAIRS_BOUND)
