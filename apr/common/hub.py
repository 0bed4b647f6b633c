"""`hf://org/name[@revision]` and `hf://datasets/org/name[@revision][:split]`: files of the Hugging Face Hub, through the
package huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .errors import AprError, InputNotFound, IOFailure, UsageError
from .packages import pip_install

T = TypeVar("T")
HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")

DATA = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w./-]+))?"
)


def is_hub(source: str) -> bool:
    """Tell a repository of the Hub from a path. Raises UsageError for any other address."""
    if HUB.fullmatch(source):
        return True
    if "://" in source:
        raise UsageError(f"{source}: neither a path nor hf://org/name[@revision]")
    return False


def hub_name(source: str) -> str:
    """Give the org/name that a path which is not there may mean on the Hub; "" for what looks like a file."""
    name = source.removeprefix("hf://")
    parts = re.fullmatch(r"([\w-][\w.-]*)/[\w.-]+", name)
    is_file = re.search(r"\.[A-Za-z][A-Za-z0-9]*$", name)
    return name if parts and not is_file and not Path(parts[1]).exists() else ""


def download(source: str, patterns: Sequence[str], revision: str | None = None) -> tuple[Path, str]:
    """Folder with those files of a repository whose names match the patterns, and the commit they are of.

    revision: beside the source or in it, a branch, tag or commit. Raises UsageError for two of them, InputNotFound for no
    such repository or package and where the Hub cannot be reached, IOFailure where the files cannot be written."""
    hub = HUB.fullmatch(source)
    if hub is None:
        raise UsageError(f"{source}: not hf://org/name[@revision]")
    repo, in_source = hub["repo"], hub["revision"]
    if in_source and revision and in_source != revision:
        raise UsageError(f"hf://{repo}: revision {in_source!r} or {revision!r}? Say one")
    wanted = in_source or revision
    name = f"hf://{repo}{f'@{wanted}' if wanted else ''}"
    by_hand = f"download its files elsewhere ({', '.join(patterns[:3])}, ...) and give their folder"
    folder = _asked(
        name, by_hand, lambda hub: hub.snapshot_download(repo, revision=wanted, allow_patterns=list(patterns))
    )
    return Path(folder), Path(folder).name


def download_data(source: str, choose: Callable[[list[str], str | None], list[str]]) -> list[Path]:
    """Download those files of a data set that choose(names, split) picks; those of an earlier call where the Hub cannot be
    reached. Raises as `download` does."""
    m = DATA.fullmatch(source)
    if m is None:
        raise UsageError(f"{source}: not hf://datasets/org/name[@revision][:split]")
    by_hand = "download its files elsewhere and give their folder"

    def get(hub: Any) -> tuple[str, list[str]]:
        which = dict(repo_type="dataset", revision=m["revision"])
        try:
            names = hub.list_repo_files(m["repo"], **which)
        except (OSError, ValueError):
            try:
                folder = hub.snapshot_download(m["repo"], **which, local_files_only=True)
            except Exception:  # the first error is the one to show
                folder = None
            if folder is None:
                raise
            there = (p for p in Path(folder).rglob("*") if p.is_file())
            return folder, choose(sorted(str(p.relative_to(folder)) for p in there), m["split"])
        chosen = choose(sorted(names), m["split"])
        return hub.snapshot_download(m["repo"], **which, allow_patterns=chosen), chosen

    folder, chosen = _asked(source, by_hand, get)
    return [Path(folder) / name for name in chosen]


def _asked(name: str, by_hand: str, ask: Callable[[Any], T]) -> T:
    """Return ask(huggingface_hub); its errors in our words."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise InputNotFound(
            f"{name}: needs the package huggingface_hub: {pip_install('huggingface_hub')}"
        ) from None
    try:
        return ask(huggingface_hub)
    except AprError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise InputNotFound(
            f"{name}: no such repository or revision, or one that needs a login; check the name, log in with "
            f"'hf auth login', or {by_hand}"
        ) from None
    except OSError as e:
        if e.errno is not None and e.filename is not None:
            # The disk, not the network.
            raise IOFailure(f"{e.filename}: {e.strerror}; make room, set HF_HOME, or {by_hand}") from None
        raise _unreachable(name, e, by_hand) from None
    except Exception as e:  # whatever the library's network layer raises
        raise _unreachable(name, e, by_hand) from None


def _unreachable(name: str, e: Exception, by_hand: str) -> InputNotFound:
    """Make the error of a download that failed, of the first line of the library's message."""
    first = str(e).strip().split("\n")[0].strip()
    # "Connection error. Got: [Errno -2] ..." goes on with what the library was given, which may be nothing.
    first = re.sub(r"[ .:]*\bGot:?\s*$", "", first).rstrip(" .:")
    return InputNotFound(
        f"{name}: cannot be downloaded: {first or type(e).__name__}; check the network, or {by_hand}"
    )
