"""Hold the pinned set of jobs of tools/pinned.py: small, deterministic uses of every command.

Each job is a function of a Recorder and has a folder of its own. What the jobs read is written here, or cut from
the real data of $APR_TEST_DATA. Training jobs are judged without end.speed: on a busy machine its verdict is not
reproducible, so `--bounds speed=...` sets the bound beyond all speeds.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pinned import Recorder

COMMANDS = (
    "", "pretrain", "run", "bisect", "trace", "tokenize", "tokenize train", "tokenize import-hf",
    "tokenize encode-corpus", "tokenize audit", "tokenize repair-manifest", "plan", "verify", "import", "export", "merge",
    "inspect", "validate", "diff", "eval", "qa", "report", "completion",
)  # fmt: skip
VOCAB = 600  # ids of the small tokenizer
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
LLAMA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", head_dim=10, rms_norm_eps=1e-5,
    rope_theta=10000.0, tie_word_embeddings=True, attention_dropout=0.0, vocab_size=VOCAB, hidden_size=40,
    intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128,
)  # fmt: skip
# config.json of a small model of each family, with what only that family has.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | dict(attention_bias=False, mlp_bias=False),
    "llama3": LLAMA | dict(num_key_value_heads=1, attention_bias=False, mlp_bias=False, rope_scaling=dict(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
    "mistral": LLAMA | dict(architectures=["MistralForCausalLM"], model_type="mistral", num_key_value_heads=4,
        tie_word_embeddings=False, sliding_window=5),
    "qwen2": LLAMA | dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", head_dim=8, rms_norm_eps=1e-6,
        rope_theta=1e6, hidden_size=56, intermediate_size=72, num_attention_heads=7, num_key_value_heads=1,
        use_sliding_window=False),
    "qwen3": LLAMA | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=12, rms_norm_eps=1e-6,
        rope_theta=1e6, attention_bias=False, use_sliding_window=False),
}  # fmt: skip
# Sizes of the small training jobs; --threads stays the default, all cores.
SMALL = (
    "--num-steps", "12", "--eval-every", "6", "--batch-size", "4", "--micro-batch-size", "2", "--seq-length", "32",
    "--lr", "3e-3", "--warmup-steps", "2", "--val-batches", "4", "--val-fraction", "0.2",
)  # fmt: skip


# Inputs


def write(r: Recorder, name: str, data: str | bytes) -> str:
    """Write a file into the work folder; returns its name, which is relative to it."""
    path = r.work / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return name


def jsonl(rows: list[Any]) -> str:
    """Make the text of a JSON Lines file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def stories(r: Recorder, count: int, first: int = 0) -> list[str]:
    """Cut texts of about 900 characters from the real excerpt of TinyStories, at blank lines."""
    text = (r.data / "tinystories-excerpt" / "tinystories-train-head.txt").read_text(encoding="utf-8")
    out, piece = [], ""
    for paragraph in text.split("\n\n"):
        piece = f"{piece}\n\n{paragraph}".strip()
        if len(piece) > 900:
            out.append(piece)
            piece = ""
        if len(out) == first + count:
            break
    return out[first:]


def corpus(r: Recorder) -> str:
    """Make a folder of text, code and JSONL, with a copy, an empty file, broken lines and broken UTF-8 in it."""
    lib = r.data / "cpython-stdlib"
    with tarfile.open(next(lib.glob("*.tar.xz"))) as archive:
        for member in archive:
            if member.name.startswith(("Lib/json/", "Lib/wsgiref/")) and member.isfile():
                file = archive.extractfile(member)
                assert file is not None
                write(r, f"corpus/{member.name}", file.read())
    shakespeare = (r.data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    for i in range(8):
        write(r, f"corpus/plays/{i}.txt", shakespeare[12_000 * i : 12_000 * (i + 1)])
    write(r, "corpus/plays/copy.txt", shakespeare[:12_000])
    write(r, "corpus/empty.txt", "")
    write(r, "corpus/broken.txt", b"no UTF-8: \xff\xfe\x00\n")
    write(r, "corpus/unicode.txt", "Schöne Grüße, 今日は 🙂 e\u0301 à bientôt\n" * 40)
    rows = jsonl([{"text": text, "id": i} for i, text in enumerate(stories(r, 40))])
    write(r, "corpus/stories.jsonl", rows + '{"text": 5}\n{"text": "cut\n{"other": "key"}\n')
    return "corpus"


def config(r: Recorder, family: str) -> str:
    """Write the config.json of a small model."""
    return write(r, f"configs/{family}.json", json.dumps(CONFIGS[family]))


def chats(r: Recorder) -> str:
    """Write conversations of one and of two turns, prompts with responses, and lines that cannot be used."""
    texts = stories(r, 60)
    rows: list[Any] = []
    for i, text in enumerate(texts):
        name, (first, *others) = f"story {i}", [s.strip() for s in text.split(". ") if s.strip()]
        turns = [
            {"role": "user", "content": f"Tell me {name}."},
            {"role": "assistant", "content": f"{first}."},
        ]
        if i % 3 == 0 and others:
            turns += [
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": f"{others[0]}."},
            ]
        if i % 5 == 0:
            turns = [{"role": "system", "content": "Be brief."}, *turns]
        rows.append({"prompt": name, "response": first} if i % 4 == 3 else {"messages": turns})
    rows += [
        rows[0],
        {"messages": [{"role": "user", "content": "no answer"}]},
        {"prompt": 7, "response": "x"},
    ]
    return write(r, "chats.jsonl", jsonl(rows))


def template(r: Recorder) -> str:
    """Write a chat template that any tokenizer can follow."""
    return write(r, "template.jinja", TEMPLATE)


def base(r: Recorder) -> Path:
    """Name the Hugging Face folder of stories260K, a trained model."""
    return r.data / "stories260K" / "hf"


# Training


def train(
    r: Recorder, name: str, *flags: str | Path, bounds: str = "", expect: int = 0, replay: bool = True
) -> str:
    """Run `apr pretrain`, record what it writes, and `apr verify` with steps replayed; returns the run directory."""
    run = f"runs/{name}"
    limits = "speed=1000000" + (f",{bounds}" if bounds else "")
    r.run(name, "pretrain", "--run-dir", run, "--bounds", limits, "--json", *flags, expect=expect)
    r.keep(name, run)
    if replay:
        verify(r, run)
    return run


def verify(r: Recorder, run: str) -> None:
    """Record `apr verify` of a run, and that a report of it can be made."""
    r.run(f"verify {run}", "verify", run, "--replay", "2", "--seed", "1", "--json")
    r.run(f"report {run}", "report", run, "-o", "report.html")
    page = r.work / "report.html"
    r.put(f"report {run}: is a page", page.is_file() and "</html>" in page.read_text(encoding="utf-8"))
    page.unlink(missing_ok=True)


def demo(r: Recorder) -> None:
    """Run the demo job with 300 steps instead of 3,500; all else is the default."""
    train(r, "demo", "--num-steps", "300")


def families(r: Recorder) -> None:
    """Train random weights of every family, from raw text."""
    for family in CONFIGS:
        flags = ("--corpus", corpus(r), "--model", config(r, family), *SMALL)
        train(r, family, *flags, "--sample", "The ", replay=family == "qwen2")


def options(r: Recorder) -> None:
    """Train with every setting that changes numbers away from its default, and to every way in which a run ends."""
    made = encoded(r)
    data = ("--dataset", made, "--model", config(r, "qwen3"), *SMALL)
    many = (
        "--z-loss", "1e-3", "--schedule", "cosine", "--lr-min", "1e-4", "--weight-decay", "0.03", "--beta1", "0.8",
        "--beta2", "0.97", "--eps", "1e-6", "--grad-clip", "0.5", "--initializer-range", "0.03", "--seed", "7",
        "--spot-check", "5", "--save-every", "4", "--keep-states", "3",
    )  # fmt: skip
    train(r, "many", *data, *many)
    train(r, "linear", *data, "--schedule", "linear", "--no-shuffle", "--grad-clip", "0")
    train(
        r, "constant", *data, "--schedule", "constant", "--threads", "1", "--spot-check", "-1", replay=False
    )
    stop = ("--num-steps", "40", "--eval-every", "2", "--patience", "0", "--min-epochs", "1")
    train(r, "early-stop", *data, *stop, "--lr", "0.05", replay=False)
    train(r, "target", *data, *stop, "--target-val-loss", "6.3", replay=False)
    train(
        r, "val-dataset", *data, "--val-dataset", f"{made}/val", "--widen", "max_top_share=0.9", replay=False
    )
    little = ("--dataset", f"{made}/val", "--tokenizer", f"{made}/tokenizer", "--model", config(r, "llama"))
    end = ("--num-steps", "4000", "--eval-every", "80", "--on-exhausted", "stop", "--no-shuffle")
    train(r, "used-up", *little, *SMALL, *end, replay=False)
    train(r, "cycle", *little, *SMALL, "--seq-length", "128", "--num-steps", "40", "--eval-every", "20")
    wild = ("--lr", "300", "--grad-clip", "0", "--warmup-steps", "0")
    train(r, "diverged", *data, *wild, expect=6)


def documents(r: Recorder) -> None:
    """Train with document masks, activation checkpointing and gradient accumulation, alone and together."""
    flags = ("--corpus", corpus(r), "--model", config(r, "llama3"), *SMALL)
    train(r, "recompute", *flags, "--recompute", replay=False)
    train(r, "mask", *flags, "--mask-documents", replay=False)
    train(r, "both", *flags, "--recompute", "--mask-documents", "--micro-batch-size", "1")


def resumed(r: Recorder) -> None:
    """Resume a run that was killed at a quarter and at half.

    A signal comes at another moment each time. What a kill leaves is made instead from a run that ended: its folder
    without the states and checkpoints of the second half. Lines of the log beyond the state are left for the resumed
    run to drop."""
    flags = (
        "--corpus",
        corpus(r),
        "--model",
        config(r, "qwen2"),
        *SMALL,
        "--save-every",
        "3",
        "--keep-states",
        "9",
    )
    whole = train(r, "undisturbed", *flags, "--sample", "The ", replay=False)
    for step in (3, 6):
        cut = f"runs/cut-{step}"
        shutil.copytree(r.work / whole, r.work / cut)
        later = [p for p in (r.work / cut / "ckpt" / "state").glob("step-*.apr") if int(p.stem[5:]) > step]
        later += [p for p in (r.work / cut / "ckpt").glob("epoch-*") if int(p.name[6:9]) * 6 > step]
        for path in [
            *later,
            *(r.work / cut / name for name in ("verdict.json", "evidence.json", "report.html", "loss.png")),
        ]:
            path.unlink(missing_ok=True)
        r.run(f"resume {cut}", "pretrain", "--resume", "--run-dir", cut, "--json")
        r.keep(cut, cut)
        verify(r, cut)
    r.run("resume a run that ended", "pretrain", "--resume", "--run-dir", whole, "--json")
    r.run("other learning rate", "pretrain", "--resume", "--run-dir", whole, "--lr", "1", expect=5)


def finetune(r: Recorder) -> None:
    """Fine-tune a trained model on more text, from its folder and from a run's checkpoint."""
    text = write(r, "finetune/stories.jsonl", jsonl([{"text": t} for t in stories(r, 60)]))
    flags = ("--corpus", text, *SMALL, "--seq-length", "64", "--lr", "1e-3", "--sample", "One day")
    run = train(r, "text", "--init", base(r), *flags)
    train(r, "again", "--init", f"{run}/ckpt/epoch-002.apr", *flags, replay=False)


def instruct(r: Recorder) -> None:
    """Fine-tune on answers, of conversations by a chat template and of pairs without one; then chat."""
    loose = "pretrained_share=9"
    flags = ("--init", base(r), "--instruct", chats(r), *SMALL, "--seq-length", "128", "--lr", "1e-3")
    run = train(r, "chats", *flags, "--chat-template", template(r), bounds=loose)
    rows = [{"instruction": f"Story {i}", "input": "x" * (i % 3)} for i in range(40)]
    answers = [{**row, "output": text[:90]} for row, text in zip(rows, stories(r, 40, 60), strict=True)]
    pairs = write(r, "pairs.jsonl", jsonl(answers))
    train(
        r,
        "pairs",
        "--init",
        base(r),
        "--instruct",
        pairs,
        *SMALL,
        "--seq-length",
        "96",
        bounds=loose,
        replay=False,
    )
    for path in sorted((r.work / "cache").rglob("*")):
        if path.is_file() and "instruct" in path.relative_to(r.work).as_posix():
            r.keep(path.relative_to(r.work).as_posix(), path)
    talk = "Tell me a story.\nAnd then?\n/reset\nTell me story 3.\n"
    r.run(
        "chat", "run", f"{run}/ckpt/epoch-002.apr", "--chat", "--system", "Be brief.", "--max-tokens", "24", "--temperature",
        "0", "--json", stdin=talk,
    )  # fmt: skip


def lora(r: Recorder) -> None:
    """Train adapters on answers and on text, go on with one, and merge it."""
    loose = "pretrained_share=9"
    flags = ("--init", base(r), *SMALL, "--seq-length", "64")
    chat = ("--instruct", chats(r), "--chat-template", template(r))
    run = train(r, "answers", *flags, *chat, "--lora-rank", "4", bounds=loose)
    text = write(r, "lora/stories.jsonl", jsonl([{"text": t} for t in stories(r, 60)]))
    some = (
        "--lora-rank",
        "2",
        "--lora-alpha",
        "3",
        "--lora-targets",
        "q,v,down",
        "--recompute",
        "--mask-documents",
    )
    train(r, "some", *flags, "--corpus", text, *some, replay=False)
    adapter = f"{run}/ckpt/epoch-002-adapter"
    train(r, "on", *flags, *chat, "--lora-init", adapter, bounds=loose, replay=False)
    for dtype in ("float32", "bfloat16"):
        r.run(
            f"merge {dtype}",
            "merge",
            base(r),
            adapter,
            "-o",
            f"merged-{dtype}.apr",
            "--dtype",
            dtype,
            "--json",
        )
        r.keep(f"merged-{dtype}.apr", f"merged-{dtype}.apr")


# Text


def encoded(r: Recorder) -> str:
    """Make token shards of the corpus; returns their folder."""
    r.run("tokenize train", "tokenize", "train", corpus(r), "--vocab-size", str(VOCAB), "-o", "tok", "--json")
    cut = ("--val-fraction", "0.2", "--shard-tokens", "20000")
    flags = ("--tokenizer", "tok", *cut, "-o", "shards", "--json")
    r.run("encode-corpus", "tokenize", "encode-corpus", "corpus", *flags)
    return "shards"


def tokenize(r: Recorder) -> None:
    """Make tokenizers and shards of text, of JSONL and of both; audit and repair them."""
    folder, encode = corpus(r), ("tokenize", "encode-corpus")
    encoded(r)
    r.keep("tok", "tok")
    r.keep("shards", "shards")
    special = (
        "--eos-token",
        "<end>",
        "--special-tokens",
        "<a>",
        "--special-tokens",
        "<b>",
        "--min-frequency",
        "3",
    )
    r.run(
        "tokenize train nfc", "tokenize", "train", f"{folder}/plays", f"{folder}/unicode.txt", "--normalization", "nfc",
        "--vocab-size", "400", "--val-fraction", "0.2", *special, "-o", "tok-nfc", "--json",
    )  # fmt: skip
    r.keep("tok-nfc", "tok-nfc")
    for source, name in (
        (r.data / "qwen2-tokenizer" / "vocab.json", "qwen2"),
        (base(r) / "tokenizer.json", "stories"),
    ):
        family = ("--family", "qwen2") if name == "qwen2" else ()
        r.run(f"import-hf {name}", "tokenize", "import-hf", source, *family, "-o", f"tok-{name}", "--json")
        r.keep(f"tok-{name}", f"tok-{name}")
    kinds: dict[str, tuple[str, ...]] = {
        "text": (f"{folder}/plays", "--tokenizer", "tok", "--eos-policy", "between", "--piece-bytes", "3000"),
        "jsonl": (
            f"{folder}/stories.jsonl",
            "--tokenizer",
            "tok-stories",
            "--eos-policy",
            "after",
            "--workers",
            "2",
        ),
        "separated": (
            f"{folder}/plays",
            "--tokenizer",
            "tok-nfc",
            "--separator",
            "All:",
            "--eos-policy",
            "none",
        ),
        "qwen2": (folder, "--tokenizer", "tok-qwen2", "--shard-tokens", "5000", "--workers", "1"),
    }
    for name, flags in kinds.items():
        r.run(f"encode {name}", *encode, *flags, "--val-fraction", "0.1", "-o", f"shards-{name}", "--json")
        r.keep(f"shards-{name}", f"shards-{name}")
        r.run(f"audit {name}", "tokenize", "audit", f"shards-{name}", "--picture", "none", "--json")
    r.run("estimate", *encode, folder, "--tokenizer", "tok", "--estimate-only", "--json")
    r.run("audit", "tokenize", "audit", "shards", "--model", config(r, "llama"), "--json")
    r.run(
        "audit for a small vocabulary",
        "tokenize",
        "audit",
        "shards",
        "--model",
        "llama-tiny",
        "--json",
        expect=9,
    )
    (r.work / "shards" / "val" / "manifest.json").unlink()
    r.run("repair-manifest", "tokenize", "repair-manifest", "shards/val", "--json")
    r.keep("repaired", "shards/val/manifest.json")
    shard = r.work / "shards" / "train" / "shard-00000.bin"
    shard.write_bytes(b"\1" + shard.read_bytes()[1:])
    r.run("audit of a damaged shard", "tokenize", "audit", "shards", "--picture", "none", "--json", expect=9)


# Checkpoints


def exchange(r: Recorder) -> None:
    """Convert between all formats and back, and inspect, validate and compare every file."""
    r.run("import", "import", base(r), "-o", "model.apr", "--json")
    r.keep("model.apr", "model.apr")
    r.run("export hf", "export", "model.apr", "-o", "hf", "--json")
    shards = ("--dtype", "bfloat16", "--max-shard-size", "200KB")
    r.run("export hf in bfloat16 and shards", "export", "model.apr", "-o", "hf-bf16", *shards, "--json")
    r.run("import again", "import", "hf-bf16", "-o", "bf16.apr", "--json")
    r.keep("bf16.apr", "bf16.apr")
    for folder in ("hf", "hf-bf16"):
        r.keep(folder, folder)
    for dtype in ("float32", "float16", "bfloat16", "q8_0"):
        name = f"{dtype}.gguf"
        r.run(
            f"export {name}",
            "export",
            "model.apr",
            "--format",
            "gguf",
            "--dtype",
            dtype,
            "-o",
            name,
            "--json",
        )
        r.keep(name, name)
        r.run(f"inspect {name}", "inspect", name, "--tensors", "--json")
        r.run(f"diff {name}", "diff", "model.apr", name, "--json", expect=0 if dtype == "float32" else 9)
    for model in ("model.apr", "hf-bf16", base(r)):
        r.run(f"inspect {Path(model).name}", "inspect", model, "--tensors", "--json")
        r.run(f"validate {Path(model).name}", "validate", model, "--json")
    r.run("diff of a round trip", "diff", base(r), "hf", "--json")
    r.run("diff within a tolerance", "diff", "model.apr", "bf16.apr", "--tolerance", "0.01", "--json")
    r.run_text("diff in words", "diff", "model.apr", "bf16.apr", "--top", "5", expect=9)
    r.run_text("inspect in words", "inspect", "model.apr", "--tensors")
    r.run_text("validate in words", "validate", "model.apr")
    whole = (r.work / "model.apr").read_bytes()
    write(r, "cut.apr", whole[: len(whole) // 2])
    write(r, "changed.apr", whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:])
    for name in ("cut.apr", "changed.apr"):
        r.run(f"validate {name}", "validate", name, "--json", expect=4)
    r.run("qa", "qa", "model.apr", "--text", write(r, "known.txt", "\n\n".join(stories(r, 6))), "--json")
    for source in (config(r, "qwen3"), "qwen2.5-0.5b"):
        flags = ("--micro-batch-size", "2", "--seq-length", "64", "--num-steps", "100", "--json")
        r.run(f"plan {source}", "plan", "--model", source, *flags)
        r.run(
            f"plan {source}, recompute", "plan", "--model", source, *flags, "--recompute", "--mask-documents"
        )
        r.run(
            f"plan {source}, adapters",
            "plan",
            "--model",
            source,
            *flags,
            "--lora-rank",
            "4",
            "--lora-targets",
            "q,v",
        )
        r.run(f"plan {source}, forward", "plan", "--model", source, *flags, "--no-train")


def evaluate(r: Recorder) -> None:
    """Evaluate a trained model: losses over text and shards, multiple choice, programs."""
    model = base(r)
    text = write(r, "held-out.jsonl", jsonl([{"text": t} for t in stories(r, 12, 100)]))
    flags = ("eval", model, "--json")
    r.run("text", *flags, "--text", text, "--seq-length", "128")
    r.run(
        "text with a stride", *flags, "--text", text, "--seq-length", "128", "--stride", "64", "--bos", "none"
    )
    exact = ("--seq-length", "64", "--max-tokens", "400", "--backend", "reference")
    r.run("text on the reference", *flags, "--text", text, *exact)
    r.run("import-hf", "tokenize", "import-hf", model / "tokenizer.json", "-o", "tok-own", "--json")
    cut = ("--tokenizer", "tok-own", "--val-fraction", "0.3", "-o", "own")
    r.run("encode", "tokenize", "encode-corpus", text, *cut, "--json")
    r.run("shards", *flags, "--dataset", "own", "--seq-length", "64", "--batch-size", "2")
    r.run(
        "shards with document masks",
        *flags,
        "--dataset",
        "own/train",
        "--seq-length",
        "64",
        "--mask-documents",
    )
    rows: list[Any] = [
        {"context": "Once upon a", "choices": [" time", " table", " the"], "answer": 0},
        {"goal": "To see a friend", "sol1": "walk to the park.", "sol2": "eat a stone of the sky.", "label": 0},
        {"id": "q", "question": "Who is Lily?", "choices": {"text": ["a girl", "a car"], "label": ["A", "B"]}, "answerKey": "A"},
    ]  # fmt: skip
    r.run("choices", *flags, "--choices", write(r, "choices.jsonl", jsonl(rows)), "--output", "chosen.jsonl")
    r.keep("chosen.jsonl", "chosen.jsonl")
    r.run(
        "programs", *flags, "--humaneval", r.data / "human-eval" / "HumanEval.jsonl.gz", "--limit", "2", "--samples", "2",
        "--max-new-tokens", "16", "--temperature", "0.5", "--output", "programs.jsonl",
    )  # fmt: skip
    r.keep("programs.jsonl", "programs.jsonl")


def generate(r: Recorder) -> None:
    """Generate text, greedy and drawn, alone and together, in float32 and int8."""
    model, prompt = base(r), "One day, a little girl"
    flags = ("run", model, prompt, "--max-tokens", "48", "--json")
    r.run("greedy", *flags, "--temperature", "0")
    r.run("drawn", *flags, "--seed", "5")
    few = ("--top-k", "20", "--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.2")
    r.run("drawn from few", *flags, "--seed", "5", *few)
    r.run("greedy to a stop", *flags, "--temperature", "0", "--stop", "mom", "--stop", "park")
    r.run("int8", *flags, "--temperature", "0", "--dtype", "int8")
    r.run("int8 drawn", *flags, "--dtype", "int8", "--seed", "6")
    r.run_text("in words", "run", model, prompt, "--max-tokens", "24", "--temperature", "0")
    texts = ("The sun", "Tom and his dog went to", "\n", 'She said, "', "A very long day " * 6)
    prompts = jsonl([{"prompt": text} for text in texts])
    for size in ("1", "4"):
        r.run(
            f"prompts, {size} at once", "run", model, "--prompts", write(r, "prompts.jsonl", prompts), "--batch-size", size,
            "--max-tokens", "16", "--seed", "3", "--json",
        )  # fmt: skip


def lockstep(r: Recorder) -> None:
    """Trace every preset for tests, and bisect beside the reference, a trace, and with every planted fault."""
    ids = ("--tokens", "5,7,100,3,9,9,41,0,122,17,63,2")
    for family in ("llama", "llama3", "mistral", "qwen2", "qwen3"):
        preset = f"{family}-tiny"
        r.run(f"trace {preset}", "trace", preset, *ids, "--backward", "-o", f"{preset}.safetensors", "--json")
        r.keep(f"{preset}.safetensors", f"{preset}.safetensors")
        r.run(f"bisect {preset}", "bisect", preset, "--seq-length", "16", "--picture", "", "--json")
    exact = ("--backend", "reference", "--dtype", "float64")
    r.run(
        "trace, reference",
        "trace",
        "qwen2-tiny",
        *ids,
        *exact,
        "--backward",
        "-o",
        "exact.safetensors",
        "--json",
    )
    r.keep("exact.safetensors", "exact.safetensors")
    r.run("diff of traces", "diff", "qwen2-tiny.safetensors", "exact.safetensors", "--json", expect=9)
    r.run(
        "bisect against a trace",
        "bisect",
        "qwen2-tiny",
        "--against",
        "exact.safetensors",
        "--picture",
        "",
        "--json",
    )
    r.run("bisect stories", "bisect", base(r), "--mask-documents", "--picture", "", "--json")
    r.run("bisect of planted faults", "bisect", "--catalogue", "--json")
    r.run("inspect a trace", "inspect", "exact.safetensors", "--json")


# Words


def help_texts(r: Recorder) -> None:
    """Record the help text of every command, and the completion scripts made of them."""
    for command in COMMANDS:
        r.put_help(command)
    for shell in ("bash", "zsh", "fish"):
        r.run_text(f"completion {shell}", "completion", shell)


def bad_inputs(r: Recorder) -> None:
    """Record exit codes and messages of inputs that are refused."""
    model = config(r, "llama")
    text = write(r, "little.txt", "a few words\n\nand a few more\n" * 30)
    write(r, "unknown.json", json.dumps({"learning-rate": 1}))
    write(r, "strange.json", json.dumps(CONFIGS["llama"] | {"hidden_act": "gelu"}))
    write(r, "nothing.apr", b"nothing")
    write(r, "taken/config.json", "{}")
    write(r, "cut.jsonl", '{"messages": [\n')
    start = ("pretrain", "--run-dir", "runs/bad")
    rows: dict[str, tuple[int, tuple[str | Path, ...]]] = {
        "no command": (2, ()),
        "unknown command": (2, ("pretain",)),
        "unknown flag": (2, ("plan", "--modell", "llama-tiny")),
        "no number": (2, ("pretrain", "--num-steps", "many")),
        "negative": (2, (*start, "--model", model, "--corpus", text, "--lr", "-1")),
        "two corpora": (2, (*start, "--model", model, "--corpus", text, "--dataset", "shards")),
        "no corpus": (2, (*start, "--model", model)),
        "adapters without a base": (2, (*start, "--model", model, "--corpus", text, "--lora-rank", "4")),
        "resume nothing": (3, ("pretrain", "--resume", "--run-dir", "runs/none")),
        "resume without a folder": (2, ("pretrain", "--resume")),
        "unknown setting": (2, (*start, "--config", "unknown.json")),
        "unknown bound": (2, (*start, "--model", model, "--corpus", text, "--bounds", "fast=1")),
        "no such corpus": (3, (*start, "--model", model, "--corpus", "missing.txt", "--seq-length", "64")),
        "no such model": (3, (*start, "--model", "llama-9000", "--corpus", text)),
        "strange activation": (5, (*start, "--model", "strange.json", "--corpus", text)),
        "vocabulary too large for the text": (5, (*start, "--model", model, "--corpus", text)),
        "bfloat16 on a CPU": (5, (*start, "--model", model, "--corpus", text, "--dtype", "bfloat16", "--device", "cpu")),
        "no conversations": (5, (*start, "--init", base(r), "--instruct", "cut.jsonl", "--chat-template", template(r))),
        "no chat template": (5, (*start, "--init", base(r), "--instruct", chats(r))),
        "positions beyond the model": (5, (*start, "--init", base(r), "--corpus", text, "--seq-length", "100000")),
        "no checkpoint": (4, ("inspect", "nothing.apr")),
        "missing checkpoint": (3, ("validate", "missing.apr")),
        "diff with nothing": (3, ("diff", base(r), "missing.apr")),
        "adapter missing": (3, ("merge", base(r), "missing", "-o", "merged.apr")),
        "merge to no .apr": (2, ("merge", base(r), "missing", "-o", "merged")),
        "export over a folder": (5, ("export", base(r), "-o", "taken")),
        "q8_0 in a folder": (2, ("export", base(r), "-o", "exported", "--dtype", "q8_0")),
        "import without output": (2, ("import", base(r))),
        "trace of a strange id": (5, ("trace", "llama-tiny", "--tokens", "1,123", "-o", "trace.safetensors")),
        "trace of words": (2, ("trace", "llama-tiny", "--tokens", "a,b", "-o", "trace.safetensors")),
        "bisect of nothing": (2, ("bisect",)),
        "two measures": (2, ("eval", base(r), "--text", text, "--choices", "choices.jsonl")),
        "eval without a measure": (2, ("eval", base(r))),
        "drawn from a negative temperature": (2, ("run", base(r), "x", "--temperature", "-1")),
        "chat without a template": (5, ("run", base(r), "x", "--chat")),
        "audit of nothing": (3, ("tokenize", "audit", "missing", "--tokenizer", base(r))),
        "encode without a tokenizer": (2, ("tokenize", "encode-corpus", text, "-o", "out")),
        "tokenizer too small": (5, ("tokenize", "train", text, "--vocab-size", "10", "-o", "tok-bad")),
        "verify nothing": (3, ("verify", "runs/none")),
        "report of nothing": (3, ("report", "runs/none")),
        "unknown shell": (2, ("completion", "powershell")),
    }  # fmt: skip
    for label, (code, args) in rows.items():
        r.run(label, *args, expect=code)


JOBS: dict[str, Callable[[Recorder], None]] = {
    "help": help_texts,
    "bad-inputs": bad_inputs,
    "tokenize": tokenize,
    "exchange": exchange,
    "generate": generate,
    "eval": evaluate,
    "lockstep": lockstep,
    "families": families,
    "options": options,
    "documents": documents,
    "resumed": resumed,
    "finetune": finetune,
    "instruct": instruct,
    "lora": lora,
    "demo": demo,
}
