"""The three stories of docs/stories.md: their data, and their commands at two sizes.

toy: a few hundred made sentences, for every test run. real: Python's library and TinyStories, a model of ten million parameters.
"""

from __future__ import annotations

import ast
import json
import random
import re
import shlex
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, dict[str, object]] = {
    "toy": dict(
        vocab=320, hidden=32, feed=64, layers=2, heads=4, length=48, batch=8, tune_batch=8,
        steps=30, rate="1e-2", tune=8, tune_rate="5e-3", prefer=6, prefer_rate="5e-4",
    ),
    "real": dict(
        vocab=8192, hidden=320, feed=864, layers=7, heads=5, length=256, batch=8, tune_batch=4,
        steps=40, rate="3e-4", tune=15, tune_rate="1e-4", prefer=8, prefer_rate="2e-5",
    ),
}  # fmt: skip
TALKS, PAIRS = 3000, 150  # of the real size, at most
RECIPE = "--val-fraction 0.1 --val-batches 8 --dtype float32 --device cpu"
STORIES = {
    "pretrain": [
        "tokenize train code prose.txt --vocab-size {vocab} --special-tokens '<|im_start|>' --special-tokens '<|im_end|>'"
        " -o tok",
        "pretrain --mix 'corpus=code weight=0.6; corpus=prose.txt weight=0.4' --tokenizer tok --model model.json"
        " --seq-length {length} --num-steps {steps} --eval-every {steps} --lr {rate} --batch-size {batch} --run-dir base "
        + RECIPE,
    ],
    "conversations": [
        "pretrain --init base/ckpt/epoch-001.apr --instruct chats --chat-template chatml.jinja --seq-length {length}"
        " --num-steps {tune} --eval-every {tune} --lr {tune_rate} --batch-size {tune_batch} --run-dir tuned "
        + RECIPE
    ],
    "preferences": [
        "pretrain --init tuned/ckpt/epoch-001.apr --preferences pairs.jsonl --preference-loss dpo --beta 0.1"
        " --seq-length {pair_length} --num-steps {prefer} --eval-every {prefer} --lr {prefer_rate} --batch-size {tune_batch}"
        " --run-dir preferred " + RECIPE
    ],
}
Talk = tuple[str, str]


def commands(story: str, size: str) -> list[list[str]]:
    """Make the arguments of each command of a story."""
    values = SIZES[size] | {"pair_length": 2 * int(str(SIZES[size]["length"]))}
    return [[word.format(**values) for word in shlex.split(line)] for line in STORIES[story]]


def write_data(folder: Path, size: str, data: Path | None = None) -> None:
    """Write code/, prose.txt, chats/ (a file for each of four shapes), pairs.jsonl, model.json and chatml.jinja into a folder.

    real: from `data`, the folder of real data."""
    s = SIZES[size]
    (folder / "code").mkdir(parents=True)
    modules, prose, talks = _toy() if data is None else _real(data)
    for name, text in modules:
        (folder / "code" / name).write_text(text)
    (folder / "prose.txt").write_text(prose)
    (folder / "chatml.jinja").write_text(TEMPLATE)
    (folder / "chats").mkdir()
    for shape, (name, record) in enumerate(SHAPES.items()):
        rows = [record(*talk) for talk in talks[shape :: len(SHAPES)]]
        (folder / "chats" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    # The reference's log-probabilities are computed of every pair, however few steps there are.
    pairs = _pairs(talks[:PAIRS])
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))
    model = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": s["vocab"], "hidden_size": s["hidden"],
        "intermediate_size": s["feed"], "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"],
        "num_key_value_heads": s["heads"], "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(model, indent=1))


SHAPES: dict[str, Callable[[str, str], dict[str, object]]] = {
    "messages": lambda q, a: {
        "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "alpaca": lambda q, a: {
        "instruction": q.partition("\n")[0],
        "input": q.partition("\n")[2],
        "output": a,
    },
    "prompts": lambda q, a: {"prompt": q, "completion": a},
}


def _pairs(talks: list[Talk]) -> Iterator[dict[str, str]]:
    """Each question with its answer, and with the words of that answer in another order."""
    rng = random.Random(3)
    for question, answer in talks:
        words = answer.split(" ")
        rng.shuffle(words)
        if (worse := " ".join(words)) != answer:
            yield {"prompt": question, "chosen": answer, "rejected": worse}


def _toy() -> tuple[list[tuple[str, str]], str, list[Talk]]:
    rng = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["".join(rng.sample(letters, rng.randrange(3, 9))) for _ in range(400)]
    verbs = ("sees", "takes", "likes", "finds", "hides", "paints", "sells")
    things = ("ball", "cat", "kite", "book", "boat", "lamp", "stone", "apple", "drum")

    def sentence() -> str:
        return f"{rng.choice(names)} {rng.choice(verbs)} {rng.randrange(10**6)} {rng.choice(things)}s"

    def function(name: str) -> str:
        a, b = rng.sample(names, 2)
        line = f"{a} = {b} {rng.choice('+-*')} {rng.randrange(10**6)}"
        return f"def {name}({a}, {b}):\n    {line}\n    return {rng.choice((a, b))}\n"

    modules = [(f"m{i}.py", "\n\n".join(function(rng.choice(names)) for _ in range(12))) for i in range(40)]
    prose = "\n\n".join(". ".join(sentence() for _ in range(6)) + "." for _ in range(80))
    talks = [(f"Say more.\n{sentence()}.", f"{sentence()}, and {sentence()}.") for _ in range(60)]
    return modules, prose, talks


def _real(data: Path) -> tuple[list[tuple[str, str]], str, list[Talk]]:
    modules, talks = [], []
    with tarfile.open(next((data / "cpython-stdlib").glob("*.tar.xz"))) as archive:
        for member in archive:
            if not member.name.endswith(".py") or not (file := archive.extractfile(member)):
                continue
            text = file.read().decode("utf-8", "ignore")
            modules.append((member.name.replace("/", "."), text))
            talks += _functions(text)
    prose = (data / "tinystories-excerpt" / "tinystories-train-head.txt").read_text()
    # No blank line stands between two stories.
    for story in re.split(r"(?<!\n)\n(?!\n)", prose):
        first, _, rest = story.strip().partition(". ")
        if 100 < len(rest) < 700:
            talks.append((f"Go on with this story.\n{first}.", rest))
    random.Random(7).shuffle(talks)
    return modules, prose, talks[:TALKS]


def _functions(text: str) -> Iterator[Talk]:
    """Short functions of a module: a question with the head and the docstring, and the body as its answer."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)) and len(node.body) > 1:
            lines = text.splitlines()
            body = "\n".join(lines[node.body[1].lineno - 1 : node.end_lineno])
            head = " ".join(line.strip() for line in lines[node.lineno - 1 : node.body[0].lineno - 1])
            if 40 < len(body) < 500 and len(said) < 300 and len(head) < 150:
                yield f"Write the body of this function.\n{head}\n{said}", body
