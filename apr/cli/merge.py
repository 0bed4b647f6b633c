"""`apr merge BASE ADAPTER -o OUT.apr`: make a LoRA adapter part of the weights it belongs to.

BASE is an .apr or GGUF file or a Hugging Face folder, ADAPTER a folder as PEFT saves it (adapter_config.json and
adapter_model.safetensors), or the ckpt/epoch-NNN-adapter of a run. W + scale * B A is summed in float64 and rounded once,
to the dtype of the base unless --dtype says another.

Example: apr merge path/to/hf-folder runs/chat/ckpt/epoch-003-adapter -o chat.apr"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.apr2 import write_apr
from ..checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from ..checkpoints.checkpoint import HF_FILES, TEMPLATE, fill, parameters, template_in
from ..checkpoints.peft import add_adapter, read_adapter
from ..checkpoints.registry import open_any
from ..checkpoints.side_files import with_one_template, with_turn_ends
from ..checkpoints.tensors import BF16
from ..common.atomic import try_output
from ..common.errors import IOFailure, Refused, UsageError
from ..common.files import read_text
from ..common.options import json_option, option, parse
from ..common.printable import printable
from ..common.units import plural
from ..evidence.adapters import merged_error
from ..model.params import Layout
from ..tokenizer.chat_template import ChatTemplate


@dataclass(frozen=True)
class Flags:
    """Options of `apr merge`."""

    base: str = option(
        "checkpoint that the adapter was trained on: an .apr or GGUF file or a Hugging Face folder",
        positional=True,
        path=True,
    )
    adapter: str = option("folder of the adapter", positional=True, path=True)
    output: str = option(
        "file to write, .apr", "", needed=True, short="o", metavar="FILE", path=True, also="out"
    )
    dtype: str | None = option(
        "dtype of the weights in the file (default: as in the base)", choices=("float32", "bfloat16")
    )
    force: bool = option("replace a file that exists", False)
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr merge", __doc__ or "")
    out = Path(f.output)
    if out.suffix != ".apr":
        raise UsageError(f"--output {f.output}: give a file that ends in .apr, such as -o merged.apr")
    if os.path.lexists(out) and not f.force:
        raise Refused(f"{out}: is there already; choose another name, or --force")
    try_output(out)
    base = open_any(f.base)
    tensors = parameters(Layout(base.cfg), base)
    adapter = read_adapter(f.adapter, base.cfg, tensors)
    # Of which the head may be apart.
    layout = Layout(adapter.cfg)
    if adapter.note:
        print(printable(f"note: {adapter.note}"), file=sys.stderr)
    host = np.zeros(layout.size, np.float32)
    fill(layout, host, base)
    add_adapter(layout, host, adapter)
    stored = {t.dtype for t in tensors.values()}
    dtype = f.dtype or ("bfloat16" if stored == {BF16} else "float32")
    meta: dict[str, Any] = config_to_metadata(adapter.cfg)
    texts = base.texts
    # As apr and TRL save it beside an adapter for conversations.
    if os.path.lexists(template := Path(f.adapter) / TEMPLATE):
        chat = ChatTemplate(read_text(template), str(template), base.named_tokens)
        texts = with_one_template({**texts, TEMPLATE: chat.text})
        if base.tokenizer:
            texts = with_turn_ends(texts, chat, base.tokenizer, sorted(base.end_ids()))
    meta |= {HF_FILES: texts} if texts else {}
    if base.chat_template is not None and template_in(texts) is None:
        meta["chat_template"] = base.chat_template
    meta["merged"] = {"base_sha256": base.sha256, "adapter_sha256": adapter.sha256, "adapter": adapter.config}
    tokenizer = base.tokenizer
    if tokenizer:
        bos = base.metadata.get("tokenizer.bos_token_id")
        embed_tokenizer(meta, tokenizer.json, tokenizer.eos_id, bos)
    write_apr(out, meta, layout.named(host), dtype)
    off, name = merged_error(tensors, adapter, open_any(str(out)).tensors, dtype)
    if not off <= 1:
        out.unlink()
        raise IOFailure(
            f"{out}: {name} is not what base and adapter give, off by {off:.3g} of what rounding leaves; nothing was kept"
        )
    result: dict[str, Any] = {
        "output": str(out),
        # The key of older versions.
        "out": str(out),
        "dtype": dtype,
        "matrices": len(adapter.deltas),
        "modules_trained_whole": sorted(adapter.saved),
        "head": "tied" if adapter.cfg.tie_word_embeddings else "apart",
        "ranks": sorted({int(d.a.shape[0]) for d in adapter.deltas.values()}),
        "base_sha256": base.sha256,
        "adapter_sha256": adapter.sha256,
        "sha256": open_any(str(out)).sha256,
    }
    if f.json:
        print(json.dumps(result, indent=2))
    else:
        ranks = ", ".join(map(str, result["ranks"]))
        words = f"{plural(len(adapter.deltas), 'matrix')} with adapters of rank {ranks}, {dtype}"
        words += f", {plural(len(adapter.saved), 'tensor')} trained whole" if adapter.saved else ""
        words += ", DoRA" if adapter.config.get("use_dora") else ""
        words += ", head and embedding taken apart" if adapter.cfg != base.cfg else ""
        print(printable(f"{out}: {words}, weights {result['sha256'][:12]}"))
    return 0
