"""Gates of a run: their table, and the findings of one run.

A gate protects against a fault that a run has once had without anybody noticing; docs/gates.md tells which. measure.py
takes the measurements. A gate that cannot be judged is SKIPPED with the reason, never passed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..common.errors import Aborted, AprError, Refused
from ..common.finding import FAIL, PASS, SKIPPED, SUSPECT, Finding, as_json, verdict_of
from ..common.options import numbers

FORMAT = "apr-verdict-1"
BEFORE, START, RUNNING, EVALUATION, END = "before", "step 0", "running", "evaluation", "end"


@dataclass(frozen=True)
class Gate:
    """One row of the table.

    when        time of judging: BEFORE, START, RUNNING, EVALUATION or END
    then        effect of a failure: "refuse" and "abort" end the run with FAIL; after SUSPECT and FAIL the run goes on
    protects    fact that holds when the gate passes
    bound_from  origin of the bound
    look_at     remedy: the next thing to look at
    numbers     bounds that --bounds may change, with their defaults
    """

    id: str
    when: str
    then: str
    protects: str
    bound_from: str
    look_at: str
    numbers: Mapping[str, float] = field(default_factory=dict)


GATES = {
    g.id: g
    for g in (
        Gate(
            "before.device", BEFORE, "refuse",
            "the device that was asked for is there and computes",
            "a product of two small matrices is computed on it and must be the one that NumPy gives in float64",
            "nvidia-smi; --device cpu trains without a GPU",
        ),
        Gate(
            "before.memory", BEFORE, "refuse",
            "the job fits in memory before any of it is taken",
            "the sum of all buffers, as `apr plan` counts them, is at most what the device has free",
            "`apr plan`; a smaller --micro-batch-size, or --recompute",
        ),
        Gate(
            "before.data", BEFORE, "refuse",
            "tokenizer, vocabulary and shards belong together, and the tokens look like text",
            "the guards of `apr tokenize audit`; docs/data.md has where each bound comes from",
            "`apr tokenize audit` on the folder of the shards",
        ),
        Gate(
            "before.disjoint", BEFORE, "refuse",
            "no document is trained on and validated with",
            "equal identities of documents on both sides, or equal windows where the shards hold one side only: none",
            "encode the corpus again with --val-fraction; a copy under another name is the same document",
        ),
        Gate(
            "before.architecture", BEFORE, "refuse",
            "every key of the configuration is honoured",
            "the configuration, written out as a config.json and read again by its strict reader, is the same",
            "the key that is named; `apr inspect`",
        ),
        Gate(
            "before.tokens", BEFORE, "SUSPECT",
            "special tokens of conversations are told apart, or can be learnt",
            "adapters leave embedding and head as they are, but those that are trained with them: of the special tokens that "
            "conversations use, no row of --init is 0, bit-equal to another's, below 1 % of the usual norm, or nearer to the "
            "mean of all rows than 1 % of the usual distance",
            "--train-embeddings, which learns them beside the adapters; train all weights, without --lora-rank; a template of "
            "tokens that the base knows, --chat-template",
        ),
        Gate(
            "before.settings", BEFORE, "refuse",
            "model, optimizer, schedule, batches and evaluation are built with the numbers that were asked for",
            "config.json as the file has it, the table of parameters and a second formula of the schedule: all equal",
            "the setting that is named, on its way from the command line to the object",
        ),
        Gate(
            "before.weights", BEFORE, "refuse",
            "the weights on the device are those of the checkpoint, or random as was asked for",
            "a checkpoint: equal name sets and equal bits, read back from the device; random: the standard deviation "
            "of every matrix within 6 standard errors, sigma / sqrt(2 n), of its own, no two rows with equal bits, no two "
            "matrices correlated, and the bits of the seed's streams drawn again",
            "`apr inspect`; --initializer-range, --seed",
        ),
        Gate(
            "before.resumed", BEFORE, "refuse",
            "a run that goes on has the weights and moments that it had saved",
            "SHA-256 of weights and moments, read back from the device, the optimizer's step count, tokens and best loss so "
            "far, the next learning rate and the SHA-256 of the next batch: equal to those in the state; steps that are taken "
            "again have the loss, norm and learning rate that the log behind the state has",
            "the saved state before it",
        ),
        Gate(
            "before.ranks", BEFORE, "refuse",
            "ranks that train together have the same code, data, settings and device, and each weight has one owner",
            "hashes and names of every rank: equal; the parts of the weights: each element once",
            "the rank that is named; ranks.json",
        ),
        Gate(
            "start.loss", START, "abort",
            "random weights know nothing, neither more nor less",
            "logits are normal with variance s^2 = C sigma^2, so the loss is ln V + s^2/2, and above it where a tied "
            "head sees the token it stands at; more than 5 standard errors of a mean of targets' logits away is too far",
            "the initial weights, the norm before the head, and whether targets are shifted by one",
            {"start_margin": 0.05},
        ),
        Gate(
            "start.pretrained", START, "abort",
            "a checkpoint that is said to be pretrained predicts text from the first step",
            "the entropy of token frequencies is what no context gives; a model that reads context is far below it. Above "
            "that, on text of a kind that it does not know, its loss is below 0.9 ln V, or the same tokens in random order "
            "cost more by 0.03 ln V",
            "`apr bisect MODEL --against hf`: biases, epsilon of the norms, pairing of rope, tokenizer; "
            "for data unlike all that the checkpoint knows: --bounds pretrained_share=1.5",
            {"pretrained_share": 0.75},
        ),
        Gate(
            "start.reproduces", START, "abort",
            "a checkpoint that is loaded again has the validation loss that was recorded with it",
            "the same windows and weights: equal but for rounding, 1e-6 of it in float32 and 1e-3 in bfloat16",
            "what changed since: the backend, the code (config.json has its hash), the data",
            {"reproduce_float32": 1e-6, "reproduce_bfloat16": 1e-3},
        ),
        Gate(
            "start.ops", START, "abort",
            "every op, forward and backward, computes what the reference computes in float64",
            "the tolerance rule of `apr bisect`, on a piece of the first batch with the run's own weights",
            "`apr bisect` on the checkpoint or preset",
        ),
        Gate(
            "start.causal", START, "abort",
            "no position sees the tokens after it",
            "with other tokens from the middle of the sequences on, what the head reads before the middle has the same "
            "bits, and what it reads from there on has not",
            "the attention mask, and position 0 of everything that shifts",
        ),
        Gate(
            "start.validation", START, "abort",
            "the validation loss is the mean over the targets of the windows that were asked for",
            "once per process: windows cut from the shards by the settings, in other pieces and order, losses of rows summed "
            "on the host, 32 of them computed from their logits: equal within 1e-5, in bfloat16 2e-3, the count exactly, "
            "standard errors, also of each source of a mixture, within 1 %",
            "`apr eval`; what was averaged: windows, rows, targets",
        ),
        Gate(
            "start.slope", START, "abort",
            "gradients are slopes of the loss, in the shapes of the job",
            "once per process, a micro-batch of the first step: (L(w + e u) - L(w - e u)) / 2e along random signs u, two for "
            "each kind of tensor, within 1 % of the size of g . u (bfloat16: 10 %) and the rounding of the loss; with "
            "--mask-documents a document begins in every other row",
            "the backward pass of the kind of tensor that is named: `apr bisect`; --recompute and --z-loss off",
        ),
        Gate(
            "start.dropout", START, "abort",
            "each adapted matrix drops by a mask of its own, for each sequence and step another, and evaluations drop nothing",
            "calls of the op in a pass over a micro-batch of the first step and in an evaluation: matrix, seed, "
            "share, scale and counters as asked for; gradients of that step and of the next differ, and are recorded what they "
            "are op by op; counters that the step itself leaves on the device",
            "--lora-dropout; apr/model/lora_dropout.py; --no-graph",
        ),
        Gate(
            "start.borders", START, "abort",
            "no token sees another document or example of its row, where that was asked for",
            "with other tokens before a border, what the head reads behind the border has the same bits, and what it reads "
            "before it has not",
            "--mask-documents; the id that ends a document",
        ),
        Gate(
            "start.formulas", START, "abort",
            "formulas are those of published models: norms, epsilons, windows, rotary embedding, AdamW",
            "once per process: cos and sin of all positions of the job computed one by one, and a training step of a small model "
            "of the family in float32 beside what transformers computed in float64, within 2e-4 of the norm of each array",
            "`apr bisect`, stage formulas; docs/golden.md",
        ),
        Gate(
            "start.averages", START, "abort",
            "loss and gradients of a batch do not depend on the pieces that it is computed in",
            "once per process, the batch of the first step from its last row to its first, one row alone and then a "
            "micro-batch at a time: same count of targets, loss, of a mixture that of each source, within 1e-5, norm 1e-4, "
            "gradients 1e-3 (bfloat16: 2e-3, 2e-2, 0.1)",
            "the scale of the loss, and what is summed over micro-batches",
        ),
        Gate(
            "start.preferences", START, "abort",
            "the loss of pairs is that of its paper, of these answers, against the model before its first step",
            "once per process, pairs of the first micro-batch with planted references: losses by formulas written a second time, "
            "and figures of the log, of answers found by their labels, within 1e-5; slopes of likely answers within 1e-3; before "
            "step 1 the reference is within 1e-4 nats a token of the model (bfloat16: 5e-3)",
            "apr/model/preferences.py; chosen and rejected; sums and means; --beta, --label-smoothing",
        ),
        Gate(
            "start.ranks", START, "abort",
            "every rank computes what the others do",
            "once per process, the first micro-batch of the first step on every rank: the loss and all gradients have equal bits",
            "the rank that is named: its processor, its memory, its versions",
        ),
        Gate(
            "run.finite", RUNNING, "abort",
            "every loss, norm and weight is a finite number",
            "the loss of each step and the L2 norms of all gradients and of all weights after it",
            "a lower --lr or a longer --warmup-steps; `apr bisect` on the last checkpoint",
        ),
        Gate(
            "run.learning-rate", RUNNING, "abort",
            "the learning rate in the log is the one that moved the weights",
            "that of a second formula of the schedule; 4,096 elements spread over all matrices and as many over all vectors, in "
            "the first 20 steps of a process and every 10th: the step that AdamW's formula gives from their moments with the "
            "numbers of the settings, fitted to how far they moved, within 1e-3 and the rounding of "
            "float32; none moved otherwise; their moments are those of the clipped gradients",
            "the optimizer, the schedule, weight decay",
            {"learning_rate_tolerance": 1e-3},
        ),
        Gate(
            "run.gradients", RUNNING, "abort",
            "the gradient norm counts all parameters, and every parameter has a gradient",
            "in the first step of a process: the norms of all tensors, squared and summed on the host in float64, together "
            "give the one that is logged, of gradients and of weights, within 1e-5; no gradient's is zero; and, as often as "
            "run.learning-rate, a huge number put into the gradients before a step is not in them when it is done",
            "the backward pass of the tensor that is named: `apr bisect`",
        ),
        Gate(
            "run.tokens", RUNNING, "abort",
            "as many tokens were trained on as are counted",
            "targets that went through the backward pass, tokens in the log and the position in the data: all equal",
            "micro-batches that are skipped, and what they leave in the sum of the loss",
        ),
        Gate(
            "run.log", RUNNING, "abort",
            "figures of the log follow from each other",
            "tokens/s times the time of the step are the tokens that it adds to those seen; bits per byte are the loss in nats "
            "times the tokens of the validation text, log2(e) and one over its bytes: within 1e-9 of it; the first "
            "8 tokens of a sample are those that a pass without a cache and a second rule of sampling give",
            "apr/training/loop.py, where the line is made; apr/common/units.py",
        ),
        Gate(
            "run.ranks-equal", RUNNING, "abort",
            "all ranks have the same weights",
            "CRC-32 of every tensor on every rank, after the first step of a process, every 10th, and at evaluations: equal",
            "the rank that is named, by majority: its memory; the last saved state is before it",
        ),
        Gate(
            "run.cross-check", RUNNING, "abort",
            "a rank computes what another one would, also long after the start",
            "every --cross-check steps each rank computes the micro-batch of another one again, of another pair each time: all "
            "gradients have equal bits",
            "the rank that is named: its processor, its memory; with two ranks, both",
        ),
        Gate(
            "run.straggler", RUNNING, "SUSPECT",
            "no rank keeps the others waiting",
            "the fastest micro-batch of a rank in 20 steps, in time of its processor, beside the median of the other ranks: what "
            "else a machine does passes, and counts little in that time; on GPUs the fastest in 3 cross-checks, which wait for "
            "no other rank",
            "the rank that is named: clock, temperature, --threads, and what else runs there",
            {"straggler": 2.0},
        ),
        Gate(
            "run.placeholder", RUNNING, "abort",
            "losses are measured, not filled in",
            "different batches never have the same loss to the last bit, nor a loss of exactly 0",
            "where the loss is read back from the device",
            {"constant_steps": 5},
        ),
        Gate(
            "run.diverged", EVALUATION, "abort",
            "the run gets better, not worse",
            "the first epoch ends at most a tenth above the loss of a uniform guess, ln V, or of the start, whichever is "
            "more; later evaluations at most at twice the one before",
            "a lower --lr, a longer --warmup-steps",
            {"first_epoch": 1.1, "next_epoch": 2.0},
        ),
        Gate(
            "run.data", RUNNING, "abort",
            "data that is used up begins again or ends the run",
            "complete passes over the windows, as counted by the reader and as they follow from the tokens trained on; as often "
            "as run.learning-rate, the rows of the batch beside the shards, at the windows that a second formula of the order "
            "gives for the number of the step: equal",
            "--on-exhausted; apr/data/batches.py",
        ),
        Gate(
            "run.mixture", RUNNING, "abort",
            "each source of a mixture is drawn in the share that was asked for",
            "windows drawn of each source in this process, beside the weights or budgets of the settings: at every step within "
            "two windows for each source and 1e-4 of them; as often as run.learning-rate, the rows of the batch beside the "
            "shards of the source whose turn it is",
            "--mix; apr/data/turns.py",
        ),
        Gate(
            "run.val-below-train", EVALUATION, "SUSPECT",
            "the validation text is not known from training",
            "the last 20 training losses of the epoch, by their mean, a line through them and one through their second half, "
            "are of the same model; validation lower than each by more than this share of it and 5 standard errors means "
            "easier text, or text that was seen",
            "near copies of documents on both sides; whether one side is another kind of text",
            {"val_below_train": 0.05},
        ),
        Gate(
            "run.margin", EVALUATION, "SUSPECT",
            "chosen answers are not lost while they are told apart from rejected ones",
            "of held-out pairs: the mean log-probability of a token of chosen answers fell by ln 2 against the reference: half "
            "as likely as before; a fall of 0.1 is noted, as a mild one is the rule",
            "a lower --lr or fewer steps, a higher --beta; chosen answers that the checkpoint would not write: --instruct first",
            {"chosen_fall": 0.693},
        ),
        Gate(
            "end.plausible", END, "SUSPECT",
            "a validation loss that nobody can reach is not believed",
            "bits per byte: large published models reach 0.54 on the Pile, small ones 0.45 on TinyStories; half of "
            "that is beyond all of them",
            "`apr tokenize audit`: unknown tokens, one repeated token, copies of one text",
            {"min_bits_per_byte": 0.25},
        ),
        Gate(
            "end.learning", END, "SUSPECT",
            "the loss did not fall faster than so few tokens can teach",
            "random start: after D tokens the validation loss is still this share of the entropy of token frequencies "
            "times log10(D / 10^4), taken from 1; docs/gates.md has the runs that it was measured on",
            "validation text inside the training data; text that repeats itself",
            {"drop_per_decade": 0.3},
        ),
        Gate(
            "end.speed", END, "SUSPECT",
            "all the work was done",
            "FLOP/s of the fastest step, 6 per weight and token and attention, at most 1.25 times those of one large "
            "product on this device",
            "steps that were skipped; run.tokens",
            {"speed": 1.25},
        ),
        Gate(
            "end.reload", END, "FAIL",
            "what was saved is what was trained",
            "the last checkpoint and the last state, read in a fresh process, have the SHA-256 that weights and moments had on "
            "the device when they were saved, and the checkpoint the validation loss that was recorded, as in "
            "start.reproduces",
            "`apr verify` on the run",
        ),
        Gate(
            "end.base", END, "FAIL",
            "adapters were trained, and nothing else",
            "SHA-256 of all weights that are not trained, as on the device at the start; and the weights that compute are "
            "base + s B A, within their rounding",
            "whatever wrote to weights between two steps",
        ),
        Gate(
            "end.target", END, "FAIL",
            "the target was reached, or it is said that it was not",
            "--target-val-loss, nats/token, against the last evaluation",
            "more steps, more data, a larger model",
        ),
    )
}  # fmt: skip
BOUNDS = {name: value for g in GATES.values() for name, value in g.numbers.items()}


def parse_bounds(text: str | None) -> dict[str, float]:
    """Parse "val_below_train=0.2,speed=2", the form of --bounds. Raises UsageError."""
    return numbers(text, "--bounds", list(BOUNDS))


class Gates:
    """Findings of one run, named by gate. Of a gate that is judged repeatedly the worst finding stays.

    findings     {gate: finding}; `where` is the step
    evaluations  {gate: number of times it was judged}
    given        bounds that replace those of the table
    seconds      {gate: time that measuring it has taken}, of those that take any
    """

    def __init__(self, bounds: Mapping[str, float]) -> None:
        self.given = dict(bounds)
        self.findings: dict[str, Finding] = {}
        self.evaluations: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, gate: str) -> Iterator[None]:
        """Add the time of the block to what a gate has cost."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[gate] = self.seconds.get(gate, 0.0) + time.perf_counter() - start

    def bound(self, name: str) -> float:
        """Return a bound of the table, or the user's in its place."""
        return self.given.get(name, BOUNDS[name])

    def judge(self, finding: Finding, step: int | None = None) -> None:
        """Keep a finding, named by its gate. Raises Aborted or Refused for a failure where the table says so."""
        gate = GATES[finding.name]
        if step is not None:
            finding = replace(finding, where=step)
        if finding.verdict == FAIL and gate.then == SUSPECT:
            finding = replace(finding, verdict=SUSPECT)
        old = self.findings.get(gate.id)
        is_judged = finding.verdict != SKIPPED
        self.evaluations[gate.id] = 1 if old is None else self.evaluations[gate.id] + is_judged
        if old is None or not old.severity > finding.severity:
            self.findings[gate.id] = finding
        if finding.verdict == FAIL and gate.then in ("abort", "refuse"):
            raise self.error(self.findings[gate.id])

    def error(self, finding: Finding) -> AprError:
        """Build the error that ends the run after a failure."""
        gate = GATES[finding.name]
        kind = Refused if gate.then == "refuse" else Aborted
        place = f"step {finding.where}: " if finding.where is not None else ""
        why = finding.why or f"{finding.measured}, must be {finding.bound}"
        return kind(f"{place}{why} [gate {gate.id}]. Look at: {gate.look_at}")

    def skip(self, gate: str, why: str) -> None:
        """Keep SKIPPED with its reason for a gate that has no finding yet."""
        if gate not in self.findings:
            self.judge(Finding.skipped(gate, why))

    def close(self, why: str) -> None:
        """Keep SKIPPED for every gate that has no finding."""
        for gate in GATES:
            self.skip(gate, why)

    def changed(self, gate: str) -> str:
        """Describe the bounds of a gate that the user replaced: "speed changed from 1.25 to 2"; "" for none."""
        defaults = GATES[gate].numbers
        return "; ".join(
            f"{n} changed from {defaults[n]:g} to {self.given[n]:g}" for n in defaults if n in self.given
        )

    @property
    def verdict(self) -> str:
        """Worst verdict of all findings; PASS where no gate could be judged."""
        return verdict_of(self.findings.values(), unasked=PASS)

    def in_order(self) -> Iterator[Finding]:
        """Yield the findings in the order of the table, failures with the remedy of their gate."""
        for gate in GATES.values():
            if gate.id in self.findings:
                finding = self.findings[gate.id]
                is_wrong = finding.verdict in (SUSPECT, FAIL)
                yield replace(finding, remedy=gate.look_at) if is_wrong else finding

    def to_json(self) -> list[dict[str, Any]]:
        """`gates` of verdict.json: each finding with its row of the table."""
        rows = []
        for finding in self.in_order():
            gate = GATES[finding.name]
            rows.append(
                {
                    "id": gate.id,
                    "when": gate.when,
                    "then": gate.then,
                    "verdict": finding.verdict,
                    "measured": finding.measured,
                    "bound": finding.bound,
                    "why": finding.why,
                    "changed": self.changed(gate.id),
                    "step": finding.where,
                    "evaluations": self.evaluations[gate.id] if finding.verdict != SKIPPED else 0,
                    "seconds": round(self.seconds.get(gate.id, 0.0), 3),
                    "protects": gate.protects,
                    "bound_from": gate.bound_from,
                    "look_at": finding.remedy,
                }
            )
        return rows

    def state(self) -> list[dict[str, Any]]:
        """Return the findings as a saved state holds them."""
        rows = as_json(
            self.in_order(),
            gate="name", verdict="verdict", measured="measured", bound="bound", why="why", step="where",
        )  # fmt: skip
        return [
            {
                **row,
                "evaluations": self.evaluations[row["gate"]],
                "seconds": self.seconds.get(row["gate"], 0.0),
                "score": self.findings[row["gate"]].score,
            }
            for row in rows
        ]

    def restore(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """Take over the findings of a saved state, except those of gates that are judged before every start."""
        for row in saved:
            gate = row["gate"]
            if gate not in GATES or (GATES[gate].when == BEFORE and gate in self.findings):
                continue
            self.evaluations[gate] = row["evaluations"]
            self.seconds[gate] = self.seconds.get(gate, 0.0) + row.get("seconds", 0.0)
            self.findings[gate] = Finding(
                gate, row["verdict"], row["measured"], row["bound"], row["why"], row["step"], row["score"]
            )
