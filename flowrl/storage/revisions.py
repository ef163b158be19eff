"""Revisions of what comes from the Hugging Face hub: OWNER/NAME@REVISION, and which commits were read."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

READ: dict[str, str] = {}
"""Repositories that this process has read from, with the commit; a run's config.json keeps them."""


def split(name: str) -> tuple[str, str | None]:
    """`OWNER/NAME@REVISION` (a commit, tag or branch) as repository and revision; None where it names none."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit's whole hash: branches and tags can be moved."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def fetch(name: str, file: str) -> tuple[Path, str | None]:
    """A file of a repository, from the cache or the hub, and the commit that it is of.

    A name without a commit is warned of once: others can change what it stands for.
    """
    from huggingface_hub import hf_hub_download

    repository, revision = split(name)
    path = Path(hf_hub_download(repository, file, revision=revision))
    commit = next((part for part in reversed(path.parts) if is_commit(part)), None)  # .../snapshots/COMMIT/FILE
    if commit is not None:
        if READ.get(repository) != commit and not is_commit(revision):
            warnings.warn(
                f"'{name}' is read from the hub without a commit, at {commit} today; write {repository}@{commit} to "
                "get the same files for ever.",
                stacklevel=2,
            )
        READ[repository] = commit
    return path, commit


def pinned(name: str) -> tuple[str, str | None]:
    """Repository and revision to load a folder or hub name with: the commit where it can be found out.

    So all files of a model are of one commit, whatever happens on the hub meanwhile.
    """
    if Path(name).exists():
        return name, None
    repository, revision = split(name)
    try:
        return repository, fetch(name, "config.json")[1] or revision
    except Exception:  # loading says what is wrong
        return repository, revision
