"""`apr report`: the page of finished, unfinished, aborted and hostile runs; charts that keep what matters."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest

from apr.cli.main import main
from apr.common.errors import InputNotFound, MalformedFile
from apr.model.hf_config import to_hf
from apr.model.presets import PRESETS
from apr.report import curve
from apr.report import page as report
from apr.report.charts import (
    MAX_LABEL,
    MAX_POINTS,
    Line,
    Mark,
    Rule,
    log_ticks,
    moving_mean,
    nice_ticks,
    plot,
    short,
    thin,
)
from apr.report.curve import loss_curve
from apr.training.settings import Settings

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "circle", "rect"}
render = partial(report.render, options=Settings)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}]]></style>\x00"


def gate(name, verdict="PASS", **more):
    texts = dict(
        when="evaluation",
        protects=f"What {name} protects.",
        bound=f"at most {len(name)}",
        bound_from=f"{name}: measured on healthy runs",
        measured=f"{name} was 0.{len(name)}",
        why="",
        look_at="",
        evaluations=7,
        step=40,
        changed="",
    )
    return dict(id=name, verdict=verdict, **{**texts, **more})


GATES = [
    gate("step0.loss", when="step 0"),
    gate("run.spike", "SUSPECT", why="It spiked.", look_at="The batch of that step.", step=30),
    gate("eval.gap", "FAIL", why="It memorises.", look_at="How often the data was seen.", changed="5 instead of 4"),
    gate("end.resume", "SKIPPED", why="not asked", step=None, evaluations=0),
]  # fmt: skip


def config(steps):
    guards = [
        dict(guard="distinct ids", verdict="PASS", figure="3,974 of 4,096", bound="at least 27.86", note=""),
        dict(guard="commonest id", verdict="SKIPPED", figure="0.3", bound="plausible", note="too few tokens"),
    ]
    return {
        "settings": {"run_dir": "runs/small", "num_steps": steps, "lr": 0.002, "batch_size": 4, "beta1": 0.9,
                     "grad_clip": 1.0, "dtype": "float32", "future_setting": 3},
        "model": to_hf(PRESETS["llama-demo"]),
        "num_parameters": 2_361_024,
        "data": {"corpus": "this Python's standard library", "train_tokens": 3_374_128, "val_tokens": 123_709,
                 "train_sha256": "7a" * 32, "val_unigram_entropy_nats": 6.63, "init_sha256": None},
        "data_guards": {"train": guards, "val": guards[:1]},
        "versions": {"apr": "0.1.0", "numpy": "2.4.6"},
        "git_commit": "696780b2521f",
        "code_sha256": "c0" * 32,
        "device": {"backend": "cpu", "cpu": "some processor", "memory_bytes": str(2**30)},
    }  # fmt: skip


def step_line(step, **more):
    loss = 3 + 5.3 * math.exp(-step / 15)
    figures = dict(
        train_loss=loss, grad_norm=2.0, weight_norm=60.0 + step / 100, lr=1e-3, tokens_per_sec=9000.0
    )
    return dict(step=step, **{**figures, **more}, tokens_seen=512 * step, wall_ms=56.9)


def make_run(
    path, steps=60, verdict="PASS", status="DONE", gates=GATES, message="", samples=True, change=None
):
    """A run directory; change: a function that alters its lines of metrics."""
    (path / "ckpt").mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config(60)))
    lines = [dict(step=0, val_loss=8.54, val_tokens=32768, val_bits_per_byte=3.627, val_loss_stderr=0.018)]
    lines.append(dict(step=1, spot_check="agree", arrays=137, worst_of_tolerance=0.52, wall_ms=3.0))
    for s in range(1, steps + 1):
        lines.append(step_line(s))
        if s % 20 == 0:
            loss = 3.1 + 5.3 * math.exp(-s / 15)
            lines.append(
                dict(
                    step=s,
                    val_loss=loss,
                    val_tokens=32768,
                    val_bits_per_byte=loss / 2.35,
                    val_loss_stderr=0.0123,
                )
            )
            name = path / "ckpt" / f"epoch-{s // 20:03d}.metadata.json"
            name.write_text(
                json.dumps({"epoch": s // 20, "step": s, "weights_sha": "ab12cd34ef56" + "0" * 52})
            )
    lines.append(dict(step=min(steps, 50), passes=1, windows=100))
    if change:
        lines = change(lines)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if verdict:
        v = dict(format="apr-verdict-1", status=status, verdict=verdict, steps=steps, val_loss=3.2, gates=gates,
                 bounds_changed={"eval.gap": 5}, message=message)  # fmt: skip
        (path / "verdict.json").write_text(json.dumps(v))
    if samples:
        found = [
            dict(step=s, prompt="def f(", text=f"def f(x): return {s}") for s in range(20, steps + 1, 20)
        ]
        (path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in found))
    return path


class Page(HTMLParser):
    """Checks that every element is closed in its order, and gathers what the tests ask for."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.links, self.words, self.handlers = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        for name, value in attrs:
            if name in ("src", "href", "data", "action", "poster", "xlink:href", "srcset"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
            if name.startswith("on"):
                self.handlers.append((tag, name))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def well_formed(text):
    """The page, checked for what every page must be."""
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") for link in page.links), page.links
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert not page.handlers
    assert not page.named("link")
    assert not page.named("img")
    assert not re.search(r"url\(|@import|https?://", text)
    return page


def test_a_finished_run(tmp_path):
    page = well_formed(render(make_run(tmp_path, verdict="FAIL")))
    for words in (
        "small", "FAIL", "DONE", "Every step was taken", "1 failed, 1 suspect, 1 passed, 1 skipped", "3.1971",
        "\u00b1 0.012", "24.46", "30,720", "2.36 M", "4 layers of 192", "uniform guess, ln V = 8.32",
        "entropy of token frequencies = 6.63", "clipped to 1", "epoch-003.apr", "ab12cd34ef56",
        "this Python's standard library", "7a" * 32, "3,374,128", "distinct ids", "3,974 of 4,096", "too few tokens",
        "val: 1 of 1 passed", "train: 1 of 2 passed",
        "LlamaForCausalLM", "some processor", "1 GiB", "2.4.6", "696780b2521f", "c0" * 32,
        "1 of 1 agree", "0.52 of its tolerance", "Passes over the data: 1", "eval.gap = 5", "return 60", "future_setting",
    ):  # fmt: skip
        assert words in page.text, words
    assert not [m for m in page.named("meta") if m.get("http-equiv") == "refresh"]
    changed, kept = page.text.split("settings have their defaults")
    assert "num_steps" in changed
    assert "beta1" in kept


def test_every_gate_and_its_figures_stand_in_the_page(tmp_path):
    text = render(make_run(tmp_path, verdict="FAIL"))
    page = Page(text)
    for g in GATES:
        for key in ("id", "measured", "bound", "protects", "why", "look_at", "bound_from", "changed"):
            assert g[key] in page.text, (g["id"], key)
    order = [page.text.index(g) for g in ("eval.gap", "run.spike", "step0.loss", "end.resume")]
    assert order == sorted(order)
    spelled = page.text.split("Needs attention")[1].split("Curves")[0]
    assert "It memorises." in spelled
    assert "The batch of that step." in spelled
    assert "step0.loss" not in spelled
    marks = text.split('<ul class="marks"')[1].split("</ul>")[0]
    assert "run.spike, step 30" in marks
    assert "eval.gap, step 40" in marks
    assert "step0.loss" not in marks


@pytest.mark.parametrize("word", ["PASS", "SUSPECT", "FAIL"])
def test_the_badge_has_a_word_and_an_icon(tmp_path, word):
    text = render(make_run(tmp_path, verdict=word, gates=[]))
    badge = re.search(r'<span class="badge \w+ big">(.+?)</span>', text)
    assert badge
    assert f"#i-{word.lower()}" in badge[1]
    assert badge[1].endswith(word)


def test_a_running_run_reloads_and_may_be_cut(tmp_path):
    run = make_run(tmp_path, steps=37, status="RUNNING", verdict="SUSPECT", gates=GATES[:2])
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 38, "train_lo')
    (run / "samples.jsonl").write_text('{"step": 20, "prompt": "a", "text": "ab"}\n{"step": 4')
    page = well_formed(render(run))
    assert "37 of 60 steps" in page.text
    assert "RUNNING" in page.text
    assert [m for m in page.named("meta") if m.get("http-equiv") == "refresh"]


def test_a_run_before_its_first_step(tmp_path):
    run = make_run(tmp_path, verdict="", samples=False)
    (run / "metrics.jsonl").unlink()
    page = well_formed(render(run))
    assert "NO VERDICT" in page.text
    assert "No step has been logged yet." in page.text
    (run / "metrics.jsonl").write_text('{"step": 0, "val_loss": 8.5}\n')
    assert "8.5000" in well_formed(render(run)).text
    (run / "metrics.jsonl").write_text(json.dumps(step_line(1)) + "\n")
    assert "512" in well_formed(render(run)).text


def test_an_old_run_without_the_newer_figures(tmp_path):
    def older(lines):
        return [
            {k: v for k, v in line.items() if k not in ("weight_norm", "val_loss_stderr")} for line in lines
        ]

    run = make_run(tmp_path, verdict="", samples=False, change=older)
    (run / "config.json").write_text("{}")
    page = well_formed(render(run))
    assert "Gradient norm" in page.text
    assert "Weight norm" not in page.text
    assert "\u00b1" not in page.text


def test_an_aborted_run_with_values_that_are_not_finite(tmp_path):
    def explode(lines):
        worse = [step_line(44, train_loss=1e30), step_line(45, train_loss=math.nan, grad_norm=math.inf)]
        return [*lines, *worse, dict(step=45, val_loss=math.nan, val_tokens=1, val_bits_per_byte=math.nan)]

    gates = [gate("run.finite", "FAIL", step=45, why="nan")]
    run = make_run(
        tmp_path,
        steps=43,
        status="ABORTED",
        verdict="FAIL",
        gates=gates,
        message="step 45: no <number>",
        change=explode,
    )
    text = render(run)
    page = well_formed(text)
    for words in ("ABORTED", "step 45: no <number>", "not drawn (train, each step): 1 value", "run.finite"):
        assert words in page.text, words
    assert "above the chart (train, each step): 1 point, the highest 1e+30 at step 44" in page.text
    for d in re.findall(r' d="([^"]*)"', text):
        assert "nan" not in d
        assert "inf" not in d
    for data in re.findall(r'<script type="application/json">(.*?)</script>', text):
        json.loads(data, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))


def test_text_of_files_stays_text(tmp_path):
    run = make_run(
        tmp_path, samples=False, gates=[gate(HOSTILE, "FAIL", why=HOSTILE, measured=HOSTILE)], message=HOSTILE
    )
    c = config(60)
    c["settings"]["run_dir"], c["settings"]["corpus"], c["settings"][HOSTILE] = (
        f"runs/{HOSTILE}",
        HOSTILE,
        HOSTILE,
    )
    c["model"][HOSTILE] = c["versions"][HOSTILE] = c["device"]["cpu"] = c["data"]["corpus"] = HOSTILE
    c["data_guards"][HOSTILE] = [
        dict(guard=HOSTILE, verdict=HOSTILE, figure=HOSTILE, bound=HOSTILE, note=HOSTILE)
    ]
    (run / "config.json").write_text(json.dumps(c))
    (run / "samples.jsonl").write_text(
        json.dumps(dict(step=20, prompt=HOSTILE, text=HOSTILE + HOSTILE + "\ud800")) + "\n"
    )
    text = render(run)
    page = Page(text)
    assert len([s for s in page.named("script") if "type" not in s]) == 1
    assert not page.named("img")
    assert not page.handlers
    assert "{{ 7*7 }}" in page.text
    assert "\x00" not in text
    text.encode("utf-8")


def test_the_only_script_that_may_run_is_the_pages_own(tmp_path):
    text = render(make_run(tmp_path))
    script = re.search(r"<script>(.*?)</script>", text, re.S)
    policy = re.search(r'content="(default-src[^"]*)"', text)
    assert script
    assert policy
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in html.unescape(policy[1])
    assert "default-src 'none'" in html.unescape(policy[1])


def test_the_same_files_give_the_same_page(tmp_path):
    first = render(make_run(tmp_path / "a"))
    assert render(tmp_path / "a") == first
    assert render(make_run(tmp_path / "b")) == first


def test_a_long_run_makes_a_small_page_that_keeps_its_spike(tmp_path):
    run, steps, spike = make_run(tmp_path), 100_000, 61_803
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, steps + 1).tolist()
    with (run / "metrics.jsonl").open("w") as f:
        for s in range(1, steps + 1):
            loss = 7.25 if s == spike else 3 + 5.3 * math.exp(-s / 9000) + noise[s]
            f.write(json.dumps(step_line(s, train_loss=loss, grad_norm=2 + noise[s])) + "\n")
            if s % 100 == 0:
                f.write(json.dumps(dict(step=s, val_loss=3.2, val_bits_per_byte=1.4)) + "\n")
    text = render(run)
    assert len(text) < 1_000_000
    page = well_formed(text)
    assert "of 1,000, evenly spaced" in page.text
    assert len(page.named("tr")) < 150
    data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text)[0])
    train = data["series"][0]
    assert len(train["x"]) <= MAX_POINTS
    assert train["y"][train["x"].index(spike)] == 7.25
    at = re.findall(
        r"[ML]([\d.]+) ([\d.]+)",
        re.findall(r'<path class="raw a" d="(M\d[^"]+)"', text.split("<figure")[1])[-1],
    )
    x, y = min(at, key=lambda p: abs(float(p[0]) - 1000 * spike / steps) + (float(p[1]) > 400))
    expected = 1000 * (data["high"] - 7.25) / (data["high"] - data["low"])
    assert abs(float(x) - 1000 * spike / steps) < 0.1
    assert abs(float(y) - expected) < 0.1


# Files that are not what they should be


def test_errors_are_one_line(tmp_path, capsys):
    with pytest.raises(InputNotFound, match="no such folder"):
        render(tmp_path / "nowhere")
    with pytest.raises(InputNotFound, match="no run in it"):
        render(tmp_path)
    assert main(["report", str(tmp_path / "nowhere")]) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "apr report: " in err


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("config.json", "{", "not JSON"),
        ("config.json", "[]", "expected a JSON object"),
        ("verdict.json", "{", "not JSON"),
        ("verdict.json", "[]", "format"),
        ("verdict.json", '{"format": "apr-verdict-9"}', "apr-verdict-1"),
        ("verdict.json", '{"format": "apr-verdict-1", "status": "DONE"}', "no status or no verdict"),
        ("verdict.json", '{"format": "apr-verdict-1", "status": "DONE", "verdict": "PASS", "gates": [1]}', "gates"),
        ("metrics.jsonl", '{"step": 1, "train_loss": 1}\nbroken\n{"step": 2, "train_loss": 1}\n', "line 2"),
        ("metrics.jsonl", '{"step": 1}\n[1]\n{"step": 3}\n', "line 2"),
        ("metrics.jsonl", '{"step": "one", "val_loss": 2}\n{"step": 3}\n', "line 1"),
        ("metrics.jsonl", '{"step": 1, "train_loss": "low"}\n', "not a number"),
        ("metrics.jsonl", '{"step": 1, "val_loss": null}\n', "not a number"),
        ("metrics.jsonl", f'{{"step": 1, "val_loss": {10**400}}}\n', "not a number"),
        ("metrics.jsonl", f'{{"step": {10**400}, "val_loss": 2}}\n{{"step": 3}}\n', "line 1"),
        ("verdict.json", '{"format": "apr-verdict-1", "status": "DONE", "verdict": "PASS", "bounds_changed": 1}', "bounds"),
        ("metrics.jsonl", '\udcff\n{"step": 3}\n', "line 1"),
        ("samples.jsonl", 'x\n{"step": 3, "text": "y"}\n', "line 1"),
        ("ckpt/epoch-001.metadata.json", "{", "not JSON"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, name, content, match):
    run = make_run(tmp_path)
    (run / name).write_text(content, errors="surrogateescape")
    with pytest.raises(MalformedFile, match=match) as e:
        render(run)
    assert name in str(e.value)


def test_figures_of_the_wrong_kind_are_left_out(tmp_path):
    run = make_run(tmp_path)
    c = config(60)
    c["settings"]["grad_clip"], c["data"]["val_unigram_entropy_nats"] = 10**400, "low"
    c["data_guards"]["val"] = [1, {"guard": "distinct ids"}]
    c["device"] = c["versions"] = None
    (run / "config.json").write_text(json.dumps(c))
    (run / "verdict.json").write_text(
        '{"format": "apr-verdict-1", "status": "NEW", "verdict": "ODD", "gates": []}'
    )
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 60, "val_loss": 3.0, "val_bits_per_byte": [], "val_loss_stderr": "x"}\n')
        f.write('{"step": 60, "spot_check": "agree", "worst_of_tolerance": {}}\n')
    page = well_formed(render(run))
    assert "ODD" in page.text
    assert "clipped to" not in page.text


# The command


def test_the_command_writes_beside_the_run_or_where_it_is_told(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert (run / "report.html").read_text(encoding="utf-8") == render(run)
    assert main(["report", str(run), "-o", str(tmp_path / "x.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "x.html")}
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == render(run)
    assert main(["report", str(run), "-o", str(tmp_path / "no" / "x.html")]) == 7
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "Example: apr report" in capsys.readouterr().out


# Charts


@pytest.mark.parametrize("n", [1, 2, 5, 59, 1025, 1501, 123_457])
def test_thinning_keeps_ends_and_extremes(n):
    y = np.sin(np.arange(n) / 7.0)
    y[n // 3], y[n // 2] = 50.0, -50.0
    kept = thin(np.arange(n), y)
    assert len(kept) <= MAX_POINTS
    assert (np.diff(kept) > 0).all()
    assert {0, n - 1, int(y.argmax()), int(y.argmin())} <= set(kept.tolist())
    if n <= MAX_POINTS:
        assert len(kept) == n


def test_the_moving_mean_is_a_mean():
    x, y = np.arange(1, 12), np.arange(11.0) ** 2
    mean_x, mean = moving_mean(x, y, 4)
    assert mean_x.tolist() == list(range(4, 12))
    np.testing.assert_allclose(mean, [y[i : i + 4].mean() for i in range(8)])


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.71, 8.62), (0, 3e-4), (5e5, 1.5e9), (-3, 4), (3.01, 3.02)]
)
def test_ticks_are_round_and_inside(low, high):
    ticks = nice_ticks(low, high, 6)
    assert 3 <= len(ticks) <= 12
    assert all(low - 1e-9 * high <= t <= high * (1 + 1e-9) for t in ticks)
    labels = [short(t, ticks[1] - ticks[0], ticks[-1]) for t in ticks]
    assert len(set(labels)) == len(labels)
    assert max(map(len, labels)) <= 7


@pytest.mark.parametrize(("low", "high"), [(0.5, 8), (1e-6, 1e12), (0.9, 1.1), (3, 400)])
def test_logarithmic_ticks(low, high):
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert all(low <= t <= high for t in ticks)


def test_labels_of_marks_and_yardsticks_do_not_meet():
    x = np.arange(1.0, 101.0)
    marks = [Mark(50.0 + i, f"gate.number{i}", "FAIL") for i in range(4)] + [Mark(5.0, "early", "SUSPECT")]
    rules = [Rule(1.00, "one"), Rule(1.01, "nearly one"), Rule(90.0, "far away")]
    p = plot("p", "P", "", [Line("y", x, np.cos(x))], rules, marks, last_x=100.0)
    assert p.mark_rows == 4
    assert {m["row"] for m in p.marks if m["label"] != "early"} == {0, 1, 2, 3}
    assert next(m for m in p.marks if m["label"] == "early")["row"] == 0
    assert any("far away lies above" in note for note in p.notes)
    (_, _, below1, right1), (_, _, below2, right2) = p.rules
    assert (below1, right1) != (below2, right2)


def test_a_constant_series_and_an_empty_one_can_be_drawn():
    x = np.arange(1.0, 6.0)
    for y in (np.zeros(5), np.full(5, 7.0), np.full(5, np.nan)):
        for log in (False, True):
            p = plot("p", "P", "", [Line("y", x, y)], last_x=5.0, log=log, zero=True)
            assert all(math.isfinite(at) for at, _ in p.y_ticks)
            assert "nan" not in json.dumps([p.paths, p.data]).lower()


def test_a_series_of_one_point_is_seen(tmp_path):
    p = plot("p", "P", "", [Line("y", np.array([1.0]), np.array([3.0]))], last_x=1.0)
    assert any(style == "dots a" and path.endswith("h0") for style, path in p.paths), p.paths
    line = step_line(1)
    loss_curve(
        [dict(step=0, val_loss=8.3), line, dict(step=1, val_loss=8.2)], 5.0, 4096, tmp_path / "one.png"
    )
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_ticks_that_differ_in_a_late_digit_are_told_apart():
    x = np.arange(1.0, 9.0)
    for spread in (1e-5, 1e-8):
        p = plot("p", "P", "", [Line("y", x, 49.93903 + spread * np.sin(x))], last_x=8.0)
        texts = [text for _, text in p.y_ticks]
        assert len({*texts}) == len(texts) > 1
        assert all(text.startswith("+") and len(text) <= MAX_LABEL for text in texts), texts
        (start,) = [float(n.removeprefix("the axis counts from ")) for n in p.notes if "counts from" in n]
        for at, text in p.y_ticks:
            place = 100 * (p.data["high"] - start - float(text)) / (p.data["high"] - p.data["low"])
            assert place == pytest.approx(at, abs=0.5)
    assert not plot("p", "P", "", [Line("y", x, 50 + np.sin(x))], last_x=8.0).notes


def test_a_loss_of_pairs_has_no_figures_of_text(tmp_path, monkeypatch):
    def change(lines):
        for line in lines:
            if "val_loss" in line:
                line.update(val_loss=0.6931, val_accuracy=0.75, val_margin=0.0125)
                line.pop("val_bits_per_byte")
        return lines

    page = render(make_run(tmp_path, change=change))
    for words in ("nats/token", "uniform guess", "token frequencies =", "Perplexity", "Bits/byte"):
        assert words not in page, words
    for words in ("<small>a pair</small>", "<td>75.0 %</td><td>+0.0125</td>", "Loss is the mean over pairs"):
        assert words in page, words
    drawn = []
    monkeypatch.setattr(curve, "write_figure", lambda path, figure: drawn.append(figure.axes[0]))
    for more, unit, texts in ((dict(val_accuracy=0.5), "a pair", 0), ({}, "nats/token", 2)):
        loss_curve(
            [step_line(1), step_line(2), dict(step=2, val_loss=0.7, **more)], 5.0, 4096, tmp_path / "x.png"
        )
        assert drawn[-1].get_ylabel() == f"loss ({unit})"
        assert len(drawn[-1].texts) == texts


def test_a_run_of_adapters_is_called_so(tmp_path):
    run = make_run(tmp_path)
    found = json.loads((run / "config.json").read_text())
    assert "adapters of rank" not in render(run)
    found["data"]["lora"] = {"rank": 4, "alpha": 8.0}
    (run / "config.json").write_text(json.dumps(found))
    assert "from random weights \u00b7 adapters of rank 4 \u00b7" in render(run)


def test_the_template_ships_with_the_package():
    text = (report.resources.files("apr.report") / "report_template.html").read_text(encoding="utf-8")
    assert "</html>" in text
