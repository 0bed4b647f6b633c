"""`apr verify`: is what a run directory says true? From outside, on any machine, without writing into it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .. import backends
from ..backends.select import choose
from ..checkpoints.apr2 import read_apr
from ..checkpoints.peft import read_adapter
from ..checkpoints.registry import open_any
from ..checkpoints.state import saved_hashes, sha256
from ..common.errors import AprError, Refused, UsageError
from ..common.files import read_json
from ..common.finding import PASS, SEVERITY, Finding, verdict_of
from ..data.batches import Batches
from ..data.conversations.instruct import InstructShards, InstructWindows, open_side
from ..evidence import measure
from ..evidence import seal as evidence
from ..evidence.adapters import checkpoint_merge_error
from ..evidence.gates import FORMAT, GATES, Gates, parse_bounds
from ..model.params import Layout
from ..model.schedule import Schedule
from ..training.display import Display
from ..training.inputs import open_inputs
from ..training.loop import LAST_STEPS, Trainer
from ..training.rundir import RunDir, bits_per_byte, code_sha256
from ..training.settings import Settings, check
from .reload import checkpoint_loss, recorded

OTHER_BACKEND = {"float32": 1e-4, "bfloat16": 5e-3}  # of a loss: two backends round in other places
OTHER_STEP = {"float32": 1e-3, "bfloat16": 2e-2}  # of a training loss some steps after a saved state
NONE_SAVED = "no checkpoint was saved"
CUT = ("ABORTED", "INTERRUPTED", "FAILED")  # status words of runs that did not end at an evaluation
SAME = 1e-9  # of a mean that is computed again from the same numbers


@dataclass(frozen=True)
class Options:
    """What to check with: see the flags of `apr verify`."""

    replay: int = 0
    within: int = 20
    seed: int = 0
    backend: str = "auto"
    device: str | None = None
    dataset: str | None = None


Told = Callable[[str], None]  # what is being done now


class Verifier:
    """The checks of one run directory, each a method that gives a Finding."""

    def __init__(self, run: Path, options: Options, told: Told = lambda text: None) -> None:
        self.run, self.options, self.told = RunDir(run), options, told
        self.config = self.run.read_config()
        self.settings = Settings(**check(self.config["settings"], str(run / "config.json")))
        self.verdict = _verdict(run / "verdict.json")
        self.metrics = self.run.metrics()
        self.steps = [m for m in self.metrics if "train_loss" in m]
        self.evaluations = [m for m in self.metrics if "val_loss" in m]

    def rows(self) -> Iterator[Finding]:
        """Every check; one that cannot be made because something is missing or damaged fails, saying what."""
        for name, ask in (
            ("files", self.files),
            ("metrics", self.steps_are_whole),
            ("learning rate", self.learning_rate),
            ("verdict", self.verdict_is_that_of_the_metrics),
            ("epochs", self.epochs),
            ("checkpoints", self.checkpoints),
            ("states", self.states),
            *([("adapters", self.adapters)] if "lora" in self.config["data"] else []),
            ("data", self.data),
            ("validation loss", self.validation_loss),
            ("replay", self.replay),
        ):
            self.told(name)
            try:
                yield ask()
            except AprError as e:
                yield Finding.of(name, False, str(e), "readable")
            except (KeyError, TypeError, ValueError, IndexError) as e:
                measured = f"an entry is missing or of the wrong kind: {e!r}"
                yield Finding.of(name, False, measured, "complete")

    @property
    def _cut(self) -> bool:
        return self.verdict["status"] in CUT

    def _last(self) -> Path | None:
        found = self.run.checkpoints()
        return found[-1] if found else None

    # From the files alone

    def files(self) -> Finding:
        """Every file against evidence.json."""
        found = evidence.compare(self.run.path)
        count = 0 if found else len(read_json(self.run.path / evidence.EVIDENCE)["files"])  # not hashed twice
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        measured = "; ".join(found[:3]) + more if found else f"{count} files"
        return Finding.of("files", not found, measured, "the SHA-256 of evidence.json")

    def steps_are_whole(self) -> Finding:
        """Each step once, in order, its tokens counted, its speed that of its time, its numbers finite."""
        s, bound = self.settings, "each step once, finite, tokens and speed as they follow"
        tokens = s.batch_size * s.seq_length
        last, repeated = self.verdict["steps"], 0
        cut = (
            self.verdict["status"] in CUT
        )  # such a run may lack the line of its last step, or an evaluation after it
        numbers = [m["step"] for m in self.steps]
        if numbers != list(range(1, last + 1)) and not (cut and numbers == list(range(1, last))):
            return Finding.of("metrics", False, f"{len(self.steps)} steps, not 1 to {last} each once", bound)
        for a, m in zip([{}, *self.steps], self.steps, strict=False):
            numbers = [m[k] for k in ("train_loss", "grad_norm", "weight_norm", "lr", "wall_ms")]
            if not all(math.isfinite(x) for x in numbers):
                return Finding.of("metrics", False, f"step {m['step']}: {numbers}", bound)
            new = m["tokens_seen"] - a.get("tokens_seen", 0)
            if not (0 < new <= tokens if self._instruct() else new == tokens):
                return Finding.of(
                    "metrics", False, f"step {m['step']}: tokens_seen = {m['tokens_seen']}", bound
                )
            if not _near(m["tokens_per_sec"] * m["wall_ms"] / 1e3, new):
                return Finding.of(
                    "metrics",
                    False,
                    f"step {m['step']}: {m['tokens_per_sec']} tokens/s in {m['wall_ms']} ms",
                    bound,
                )
            repeated = repeated + 1 if a.get("train_loss") == m["train_loss"] else 0
            if repeated >= Gates(parse_bounds(s.bounds)).bound("constant_steps") - 1 or m["train_loss"] == 0:
                return Finding.of(
                    "metrics", False, f"step {m['step']}: train_loss {m['train_loss']} once more", bound
                )
        due = [0, *(e for e in range(1, last + 1) if e % s.steps_per_epoch == 0 or e == s.num_steps)]
        found = [m["step"] for m in self.evaluations]
        if found not in (due, [*due, last]) and not (
            cut and found == due[:-1]
        ):  # data may end between two of them
            return Finding.of("metrics", False, f"evaluations at steps {found}, due at {due}", bound)
        return Finding.of("metrics", True, f"{len(self.steps):,} steps, {len(found)} evaluations", bound)

    def _instruct(self) -> bool:
        """Whether the run was trained on answers only; their number in each step is compared with the data in `data`."""
        return self.settings.instruct is not None or "packed" in self.config["data"]

    def learning_rate(self) -> Finding:
        """The column of the log against the schedule of the settings."""
        s = self.settings
        assert s.lr is not None
        assert s.lr_min is not None
        assert s.warmup_steps is not None
        schedule = Schedule(s.schedule, s.lr, s.lr_min, s.warmup_steps, s.num_steps)
        wrong = [m["step"] for m in self.steps if not _near(m["lr"], schedule(m["step"]))]
        bound = f"{s.schedule} up to {s.lr:g}, {s.warmup_steps} warm-up steps"
        measured = (
            f"step {wrong[0]} and {len(wrong) - 1} more differ" if wrong else f"{len(self.steps):,} steps"
        )
        return Finding.of("learning rate", not wrong, measured, bound)

    def verdict_is_that_of_the_metrics(self) -> Finding:
        """verdict.json against the last evaluation, and the gates that the log can answer, asked again."""
        v, bound = self.verdict, "what follows from metrics.jsonl and config.json"
        if v["status"] == "RUNNING":
            return Finding.of(
                "verdict", None, "RUNNING", bound, "the run has not ended; --resume goes on with it"
            )
        val = self.evaluations[-1]["val_loss"] if self.evaluations else None
        if v["val_loss"] != val:
            return Finding.of(
                "verdict", False, f"val_loss {v['val_loss']} in verdict.json, {val} in metrics.jsonl", bound
            )
        rows = {g["id"]: g for g in v["gates"]}
        if set(rows) != set(GATES):
            return Finding.of(
                "verdict", False, f"gates {sorted(set(rows) ^ set(GATES))} are missing or unknown", bound
            )
        worst = verdict_of((g["verdict"] for g in v["gates"]), unasked=PASS)
        if v["verdict"] != worst:
            return Finding.of(
                "verdict", False, f"the verdict is {v['verdict']}, the worst of its gates {worst}", bound
            )
        asked = self._gates_again()
        for o in asked.in_order():
            said = rows[o.name]["verdict"]
            if SEVERITY.index(o.verdict) > SEVERITY.index(said):
                return Finding.of(
                    "verdict",
                    False,
                    f"{o.name} is {said} in verdict.json, {o.verdict} by the log: {o.measured}",
                    bound,
                )
        return Finding.of(
            "verdict", True, f"{v['verdict']}, {len(asked.findings)} gates asked again from the log", bound
        )

    def _gates_again(self) -> Gates:
        """The gates whose figures stand in the log, asked again; a bad answer does not raise here."""
        s, c, shards = self.settings, self.config, self._val_figures()
        gates = Gates(parse_bounds(s.bounds))

        def judge(finding: Finding) -> None:
            with suppress(AprError):  # the gate keeps the finding before it raises
                gates.judge(finding)

        before: float | None = None
        for i, m in enumerate(self.evaluations):
            judge(
                Finding.of("run.finite", math.isfinite(m["val_loss"]), f"val_loss {m['val_loss']}", "finite")
            )
            if i and before is not None:
                most = gates.bound("next_epoch") * before
                if i == 1:
                    most = gates.bound("first_epoch") * max(math.log(c["model"]["vocab_size"]), before)
                judge(
                    Finding.of(
                        "run.diverged", m["val_loss"] <= most, f"{m['val_loss']:.4f}", f"at most {most:.4f}"
                    ),
                )
            before = m["val_loss"]
            epoch = [x["train_loss"] for x in self._epoch(i)]
            if epoch:
                share, noise = gates.bound("val_below_train"), m["val_loss_stderr"]
                judge(
                    measure.below_train(m["val_loss"], noise, epoch[-LAST_STEPS:], epoch, share),
                )
                bits = m["val_bits_per_byte"]
                if shards and not _near(bits, bits_per_byte(m["val_loss"], *shards)):
                    bits = -1.0
                if not self._instruct() or bits < 0:
                    judge(measure.plausible(bits, gates.bound("min_bits_per_byte")))
                if not s.init:
                    seen, entropy = epoch_tokens(self._epoch(i)), c["data"]["val_unigram_entropy_nats"]
                    judge(
                        measure.learning(m["val_loss"], entropy, seen, gates.bound("drop_per_decade")),
                    )
        if s.target_val_loss is not None and before is not None:
            judge(
                Finding.of(
                    "end.target",
                    before <= s.target_val_loss,
                    f"{before:.4f}",
                    f"at most {s.target_val_loss:g}",
                ),
            )
        return gates

    def _val_figures(self) -> tuple[int, int] | None:
        """(tokens, bytes) of the validation shards, where config.json has them."""
        data = self.config["data"]
        return (data["val_tokens"], data["val_bytes"]) if "val_bytes" in data else None

    def _epoch(self, i: int) -> list[dict[str, Any]]:
        """The steps between evaluation i - 1 and evaluation i."""
        low = self.evaluations[i - 1]["step"] if i else 0
        return [m for m in self.steps if low < m["step"] <= self.evaluations[i]["step"]]

    def epochs(self) -> Finding:
        """Each ckpt/epoch-NNN.metadata.json against the steps and the evaluation that it sums up."""
        found = sorted(self.run.ckpt.glob("epoch-*.metadata.json"))
        bound = "means and maxima of metrics.jsonl"
        for path in found:
            m = read_json(path)
            i = m["epoch"]
            steps = self._epoch(i)
            losses = [x["train_loss"] for x in steps]
            for key, want in (
                ("step", steps[-1]["step"]),
                ("train_loss", float(np.mean(losses))),
                ("train_loss_last", float(np.mean(losses[-LAST_STEPS:]))),
                ("val_loss", self.evaluations[i]["val_loss"]),
                ("val_ppl", math.exp(min(self.evaluations[i]["val_loss"], 700))),
                ("train_ppl", math.exp(min(float(np.mean(losses)), 700))),
                ("tokens_seen", steps[-1]["tokens_seen"]),
                ("grad_norm_max", max(x["grad_norm"] for x in steps)),
            ):
                if not _near(m[key], want):
                    return Finding.of(
                        "epochs", False, f"{path.name}: {key} = {m[key]}, {want} by the log", bound
                    )
        cut = self._cut
        if len(found) != len(self.evaluations) - 1 and not (cut and len(found) == len(self.evaluations) - 2):
            return Finding.of(
                "epochs",
                False,
                f"{len(found)} epochs, {len(self.evaluations) - 1} evaluations after training",
                bound,
            )
        return Finding.of("epochs", True, f"{len(found)} epochs", bound)

    def checkpoints(self) -> Finding:
        """Each checkpoint against its recorded hash."""
        found, ends = self.run.checkpoints(), list(self.run.ckpt.glob("epoch-*.metadata.json"))
        if not found and not ends and self._cut:
            return Finding.of("checkpoints", None, "", "the SHA-256 of their metadata", NONE_SAVED)
        if {p.stem for p in found} != {p.name.removesuffix(".metadata.json") for p in ends}:
            return Finding.of(
                "checkpoints",
                False,
                f"{len(found)} checkpoints, {len(ends)} with metadata",
                "the same epochs",
            )
        for path in found:
            r = recorded(self.run.path, path)
            loaded = open_any(str(path))
            names = [s.hf for s in Layout(loaded.cfg).in_order()]
            sha = sha256(np.asarray(loaded.tensors[n]) for n in names)
            if sha != r.metadata["weights_sha"]:
                return Finding.of(
                    "checkpoints",
                    False,
                    f"{path.name}: weights {sha[:12]}",
                    f"recorded {r.metadata['weights_sha'][:12]}",
                )
            if loaded.metadata["evaluation"]["val_loss"] != r.val_loss:
                return Finding.of(
                    "checkpoints",
                    False,
                    f"{path.name}: another val_loss inside than in its metadata",
                    "equal",
                )
        return Finding.of(
            "checkpoints", bool(found), f"{len(found)} checkpoints", "the SHA-256 of their metadata"
        )

    def states(self) -> Finding:
        """Each saved state against its hash, and its moments against those of the epoch that ends there."""
        bound = "the SHA-256 recorded in the state, and in the metadata of an epoch that ends there"
        if not self.run.states() and self._cut:
            return Finding.of("states", None, "", bound, "no state was saved")
        ends = {m["step"]: m for m in (read_json(p) for p in self.run.ckpt.glob("epoch-*.metadata.json"))}
        for path in self.run.states():
            file = read_apr(path)
            sha, optimizer_sha = saved_hashes(file.metadata, file.tensors, str(path))
            if sha != file.metadata["state_sha256"]:
                return Finding.of("states", False, f"{path.name}: {sha[:12]}", bound)
            end = ends.get(file.metadata["training"]["step"])
            if end and end["optimizer_state_sha"] != optimizer_sha:
                return Finding.of(
                    "states", False, f"{path.name}: its moments are not those of epoch {end['epoch']}", bound
                )
        return Finding.of("states", bool(self.run.states()), f"{len(self.run.states())} states", bound)

    def adapters(self) -> Finding:
        """The last adapter, added to the base, against the checkpoint of its epoch."""
        path, bound = self._last(), "the checkpoint, within rounding"
        if path is None:
            return Finding.of("adapters", None, "", bound, NONE_SAVED)
        folder, init = path.with_name(f"{path.stem}-adapter"), str(self.settings.init)
        if not Path(init).exists():
            return Finding.of("adapters", None, "", bound, f"the base {init} is not there")
        base, merged = open_any(init), open_any(str(path))
        if base.sha256 != self.config["data"]["init_sha256"]:
            return Finding.of(
                "adapters",
                False,
                f"{init}: weights {base.sha256[:12]}",
                f"{self.config['data']['init_sha256'][:12]}",
            )
        worst, where = checkpoint_merge_error(
            base, read_adapter(str(folder), base.cfg), merged, self.settings.dtype or "float32"
        )
        return Finding.of(
            "adapters", worst <= 1, f"{folder.name}: off by {worst:.2f} of rounding at {where}", bound
        )

    # With the data

    def data(self) -> Finding:
        """The shards as they are on disk against the hashes in config.json."""
        want, bound = self.config["data"], "the SHA-256 of config.json"
        checkpoint = self._last()
        if checkpoint is None:
            return Finding.of("data", None, "", bound, NONE_SAVED)
        tokenizer = open_any(str(checkpoint)).tokenizer
        if tokenizer is None or tokenizer.sha256 != want["tokenizer_sha256"]:
            return Finding.of("data", False, "the tokenizer in the checkpoint is not the run's", bound)
        tokens = 0
        for side, folder in self._folders().items():
            if not folder.is_dir():
                return Finding.of(
                    "data", None, "", bound, f"{folder} is not there; --dataset says where the shards are now"
                )
            shards = open_side(folder, tokenizer)
            if shards.sha256 != want[f"{side}_sha256"]:
                return Finding.of("data", False, f"{folder}: {shards.sha256[:12]}", bound)
            tokens += shards.total_tokens
            if isinstance(shards, InstructShards) and side == "train" and (wrong := self._miscounted(shards)):
                return Finding.of("data", False, wrong, bound)
        return Finding.of("data", True, f"{tokens:,} tokens read", bound)

    def _miscounted(self, shards: InstructShards) -> str:
        """Which step's trained tokens are not those of the windows that it read, or ""."""
        s, counted = self.settings, 0
        stream = Batches(
            InstructWindows(shards, s.seq_length), s.batch_size, s.seed, s.shuffle, s.on_exhausted
        )
        for m in self.steps:
            counted += stream.skip()
            if m["tokens_seen"] != counted:
                return f"step {m['step']}: tokens_seen = {m['tokens_seen']}, its windows and those before have {counted}"
        return ""

    def _folders(self) -> dict[str, Path]:
        if self.options.dataset is not None:
            from ..data.audit import sides_of

            return sides_of(Path(self.options.dataset))
        return {k: Path(v) for k, v in self.config["data_folders"].items()}

    def validation_loss(self) -> Finding:
        """The last checkpoint's validation loss on another backend than the run's."""
        checkpoint = self._last()
        if checkpoint is None:
            return Finding.of("validation loss", None, "", "the recorded loss", NONE_SAVED)
        r = recorded(self.run.path, checkpoint)
        used, bound = self.config["device"]["backend"], "the recorded loss"
        other = self.options.backend
        if other == "none":
            return Finding.of("validation loss", None, "", bound, "--backend none")
        if other == "auto":
            other = "reference" if used == "cpu" else "cpu"
        if not all(f.is_dir() for f in self._folders().values()):
            return Finding.of(
                "validation loss",
                None,
                "",
                bound,
                "the shards are not there; --dataset says where they are now",
            )
        backend = backends.get(other) if other == "reference" else choose(other).backend
        found = checkpoint_loss(r, backend, backend.dtypes[0], self.options.dataset)
        tolerance = OTHER_BACKEND[self.settings.dtype or "float32"]
        off = abs(found.mean - r.val_loss) / r.val_loss
        measured = f"{found.mean:.6f} on {other}, {r.val_loss:.6f} recorded on {used}: {off:.1e} of it apart"
        return Finding.of("validation loss", off <= tolerance, measured, f"at most {tolerance:g}")

    def replay(self) -> Finding:
        """Recorded steps, chosen at random, computed again from the saved state before them."""
        o, bound = self.options, "the recorded loss and gradient norm"
        if not o.replay:
            return Finding.of(
                "replay", None, "", bound, "not asked for; --replay K computes K recorded steps again"
            )
        bases = [0, *(int(p.stem[5:]) for p in self.run.states())]
        base_of = {m["step"]: max(b for b in bases if b < m["step"]) for m in self.steps}
        near = [step for step, base in base_of.items() if step - base <= o.within]
        if not near:
            return Finding.of(
                "replay", None, "", bound, f"no step is within {o.within} of a saved state; raise --within"
            )
        chosen = sorted(np.random.default_rng(o.seed).permutation(near)[: o.replay].tolist())
        trainer, same = self._trainer()
        recorded_ = {m["step"]: m for m in self.steps}
        tolerance = 0.0 if same else OTHER_STEP[trainer.model.dtype]
        worst = 0.0
        for base in sorted({base_of[step] for step in chosen}):
            wanted = [step for step in chosen if base_of[step] == base]
            if base:
                trainer.load(self.run.state / f"step-{base:06d}.apr")
            else:
                trainer.begin_anew()
            while trainer.progress.step < wanted[-1]:
                self.told(f"replay: step {trainer.progress.step + 1}, up to {wanted[-1]}")
                line = trainer.train_step()
                if line["step"] in wanted:
                    was = recorded_[line["step"]]
                    off = max(
                        abs(line[k] - was[k]) / max(abs(was[k]), 1e-9) for k in ("train_loss", "grad_norm")
                    )
                    if off > tolerance:
                        said = f"step {line['step']}: loss {line['train_loss']!r}, recorded {was['train_loss']!r}"
                        return Finding.of(
                            "replay", False, said, "equal bits" if same else f"within {tolerance:g} of it"
                        )
                    worst = max(worst, off)
        steps = ", ".join(map(str, chosen[:8])) + (" ..." if len(chosen) > 8 else "")
        measured = (
            f"{len(chosen)} of {len(near):,} steps in reach ({steps}; seed {o.seed}), worst {worst:.1e}"
        )
        return Finding.of(
            "replay",
            True,
            measured,
            "equal bits" if same else f"within {tolerance:g}: another backend or version",
        )

    def _trainer(self) -> tuple[Trainer, bool]:
        """The run's trainer as it was, and whether everything that decides on the last bit is as it was."""
        device = self.options.device or self.config["settings"]["device"]
        changes: dict[str, Any] = {"device": device, "resume": False, "spot_check": -1, "sample": None}
        if device == "cpu" and self.settings.dtype == "bfloat16":
            changes["dtype"] = "float32"
        with TemporaryDirectory(prefix="apr-verify-") as folder:
            if self.options.dataset:  # the tokenizer need not lie beside the shards: the checkpoint has it
                changes |= {
                    "dataset": self.options.dataset,
                    "corpus": None,
                    "instruct": None,
                    "chat_template": None,
                    "tokenizer": folder,
                    "val_dataset": None,
                }
                text = open_any(str(self.run.checkpoints()[-1])).tokenizer_json
                Path(folder, "tokenizer.json").write_text(text or "", encoding="utf-8")
            inputs = open_inputs(dataclasses.replace(self.settings, **changes))
        for key in ("train_sha256", "val_sha256", "tokenizer_sha256"):
            found = {
                "train_sha256": inputs.train.shards.sha256,
                "val_sha256": inputs.val.shards.sha256,
                "tokenizer_sha256": inputs.tokenizer.sha256,
            }[key]
            if found != self.config["data"][key]:
                raise Refused(f"replay: {key} is {found[:12]}, the run's {self.config['data'][key][:12]}")
        trainer = Trainer(inputs, self.run, Display(), False, Gates(parse_bounds(self.settings.bounds)))
        was, now = self.config["device"], inputs.backend.describe()
        same = all(
            was.get(k) == now.get(k)
            for k in ("backend", "gpu", "cpu", "threads", "cuda", "cublaslt", "matmul_algorithms")
        )
        return trainer, same and self.config.get("code_sha256") == code_sha256()


def epoch_tokens(steps: list[dict[str, Any]]) -> int:
    """Tokens seen at the end of some steps."""
    return int(steps[-1]["tokens_seen"])


def _near(a: Any, b: float) -> bool:
    return isinstance(a, int | float) and abs(a - b) <= SAME * max(abs(a), abs(b))


def _verdict(path: Path) -> dict[str, Any]:
    """verdict.json. Raises UsageError where there is none: the run never came to an evaluation."""
    if not path.is_file():
        raise UsageError(
            f"{path}: not there; the run is older than verdicts, or has not come to its first evaluation"
        )
    v = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < 1 << 24 else None
    if not isinstance(v, dict) or v.get("format") != FORMAT:
        raise Refused(f"{path}: not a record of {FORMAT}")
    return v
