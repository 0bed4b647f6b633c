"""What mkdocs asks of us while it builds the site: notebooks become pages, and links to them lead there.

A notebook lies in docs/ as Jupyter writes it, with its outputs, so that a code host shows it; the site gets it as Markdown.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(\]\([^)\s]*)\.ipynb(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """A page beside every notebook."""
    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        text = Path(str(file.abs_src_path)).read_text(encoding="utf-8")
        name = file.src_uri.removesuffix(".ipynb")
        files.append(
            File.generated(config, f"{name}.md", content=markdown(json.loads(text), Path(name).name))
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to a notebook lead to its page, except from that page itself."""
    if page.file.src_uri.removesuffix(".md") + ".ipynb" in files.src_uris:
        return markdown
    return LINK.sub(r"\1.md\2)", markdown)


def markdown(notebook: dict[str, Any], name: str) -> str:
    """A notebook as Markdown, its pictures inside."""
    parts = []
    for i, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            if i == 0:
                parts.append(f"This page is the notebook [{name}.ipynb]({name}.ipynb), which you can run.")
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += [part for output in cell["outputs"] if (part := shown(output))]
    return "\n\n".join(parts) + "\n"


def shown(output: dict[str, Any]) -> str:
    """What a cell printed or drew."""
    if output["output_type"] == "stream":
        return fenced("".join(output["text"]))
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return fenced("".join(data.get("text/plain", "")))


def fenced(text: str) -> str:
    """Text as it stands."""
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
