"""The site: every page in the navigation, tables and lists rendered, nothing loaded from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def test_the_navigation_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    named = re.findall(r": ([\w/.-]+\.md)$", nav, re.M)
    pages = [str(p.relative_to(DOCS)) for p in PAGES]
    notebooks = [str(p.relative_to(DOCS).with_suffix(".md")) for p in DOCS.rglob("*.ipynb")]
    assert sorted(named) == sorted([*pages, *notebooks])


def unrendered(markdown: str) -> list[int]:
    """Lines at which a table or a list begins right behind a paragraph: the site would show their text as it stands."""
    out, fenced, before = [], False, ""
    lines = markdown.splitlines()
    for number, (line, after) in enumerate(zip(lines, [*lines[1:], ""], strict=True), 1):
        fenced ^= line.startswith("```")
        begins = re.match(r"\||[-*] |\d+\. ", line)
        # Inside a list or a table, behind a heading or a comment, and in a line that goes on, there is no need of a blank line.
        goes_on = (
            not before.strip()
            or re.match(r"\s*(\||[-*] |\d+\. |#|<!--|```)", before)
            or before.startswith(" ")
        )
        # Rows that a blank line cuts off are no table: a table begins with its head.
        headless = (
            line.startswith("|") and not before.startswith("|") and not re.match(r"\|[-|: ]+\|$", after)
        )
        if not fenced and ((begins and not goes_on) or headless):
            out.append(number)
        before = line
    return out


def test_tables_and_lists_have_a_blank_line_before_them():
    assert unrendered("text\n| a |\n|---|") == [2]
    assert unrendered("| a |\n|---|\n| b |\n\n| c |\n") == [5]
    assert unrendered("# Head\n| a |\n|---|\n\ntext\n- a\n- b\n") == [6]
    assert not unrendered("```\ntext\n| a |\n```\n- a\n  b\n- c")
    for page in PAGES:
        assert not unrendered(page.read_text()), page


class Prose(HTMLParser):
    """Collect the text of a built page, a line for each paragraph or cell, without code and without the navigation."""

    CODE: ClassVar = {"pre", "code", "script", "style", "svg"}

    def __init__(self) -> None:
        super().__init__()
        self.lines, self._code, self._article = [""], 0, 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._code += tag in self.CODE
        self._article += tag == "article"
        if tag in ("p", "li", "td", "th", "h1", "h2", "h3", "h4"):
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in self.CODE
        self._article -= tag == "article"

    def handle_data(self, data: str) -> None:
        if self._article and not self._code:
            self.lines[-1] += data


# What Markdown leaves in a page when it was not understood: a table, a link, a list, a fence, bold text, a heading.
LEFT_OVER = re.compile(r"^\s*\||\|---|\]\(|^\s*[-*] \S|^\s*\d+\. |\*\*|`|^#+ |\]\[", re.M)


def left_over(page: str) -> list[str]:
    """Lines of a built page that show Markdown as it was written."""
    prose = Prose()
    prose.feed(page)
    return [line for line in prose.lines if LEFT_OVER.search(line)]


@pytest.mark.parametrize(
    "text", ["| a | b |\n|---|---|", "see\n- this", "1. one", "[a](b.md)", "**so**", "```"]
)
def test_what_is_not_rendered_is_seen(text):
    assert left_over(f"<article><p>{text}</p></article>")
    assert not left_over(f"<article><p>so</p><pre><code>{text}</code></pre></article><p>{text}</p>")


def test_the_site_builds_without_a_warning_and_without_a_network(tmp_path):
    mkdocs = shutil.which("mkdocs", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mkdocs is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?://[^\s\">]+)", text)
        assert not loaded, f"{page.name} loads {loaded}"
        assert not left_over(text), f"{page.name}: {left_over(text)}"
    assert "bias missing" in (tmp_path / "notebooks" / "look-inside.html").read_text()
