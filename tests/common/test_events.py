"""Events reach the observers that hear them, in order; the training loop knows none of its observers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import apr
from apr.common import events
from apr.common.events import Event, Noted, Started, emit


class Hears:
    def __init__(self, name, heard):
        self.name, self.heard = name, heard

    def noted(self, e):
        self.heard.append((self.name, e.text))


def test_observers_hear_in_their_order():
    heard: list[tuple[str, str]] = []
    emit([Hears("a", heard), object(), Hears("b", heard)], Noted("x"))
    emit([Hears("a", heard)], Started(0, 1))
    assert heard == [("a", "x"), ("b", "x")]


def test_an_exception_of_an_observer_is_one_of_the_run():
    class Fails:
        def noted(self, e):
            raise ValueError(e.text)

    heard: list[tuple[str, str]] = []
    with pytest.raises(ValueError, match="x"):
        emit([Fails(), Hears("after", heard)], Noted("x"))
    assert heard == []


def test_every_event_has_a_method_of_its_own():
    kinds = [
        k for k in vars(events).values() if isinstance(k, type) and issubclass(k, Event) and k is not Event
    ]
    assert len({k.method for k in kinds}) == len(kinds) > 10
    assert events.WeightsReady.method == "weights_ready"


def test_the_loop_knows_no_observer():
    """Nothing of gates, evidence, reports, spot checks or displays is imported by the loop."""
    tree = ast.parse((Path(apr.__file__).parent / "training" / "loop.py").read_text())
    names = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    rooms = {name.split(".")[0] for name in names}
    assert not rooms & {"evidence", "report", "bisect", "cli", "verify", "display", "spot", "loggers"}
    assert "print" not in {
        n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
