"""Revisions of what comes from the Hugging Face hub: OWNER/NAME@REVISION, and which commits were read."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

READ: dict[str, str] = {}
"""Repositories that this process has read from, with the commit; a run's config.json keeps them."""


def split(name: str) -> tuple[str, str | None]:
    """Split `OWNER/NAME@REVISION` (a commit, tag or branch) into repository and revision; None without one."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def is_commit(revision: str | None) -> bool:
    """Tell whether a revision is a commit's whole hash: branches and tags can be moved."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def fetch(name: str, file: str) -> tuple[Path, str | None]:
    """Fetch a file of a repository, from the cache or the hub, with the commit that it is of.

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
    """Find repository and revision to load a folder or hub name with: the commit where it can be found out.

    So all files of a model are of one commit, whatever happens on the hub meanwhile.
    """
    if Path(name).exists():
        return name, None
    repository, revision = split(name)
    try:
        return repository, fetch(name, "config.json")[1] or revision
    except Exception:  # loading says what is wrong
        return repository, revision


PATIENCE = 10.0
"""Seconds that the hub has for its answer to whether a file may be had."""
WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
"""Parts that no pipeline can do without."""
_SHARD = re.compile(r"-\d+-of-(\d+)\.safetensors")


def at_hand(name: str) -> tuple[bool, str]:
    """Tell whether a pipeline of the hub can be read here and now, and why: a cache that has it, or the hub's answer.

    Nothing is downloaded; of a gated repository the hub answers only to those that have accepted its licence.
    """
    import huggingface_hub as hub

    repository, revision = split(name)
    index = hub.try_to_load_from_cache(repository, "model_index.json", revision=revision)
    if isinstance(index, str) and _is_complete(Path(index)):
        return True, "its files are in the local cache"
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, "model_index.json", revision=revision), timeout=PATIENCE)
    except Exception as error:  # the client's own, and those of whichever HTTP library it uses
        if "Gated" in type(error).__name__:
            return (
                False,
                f"its licence has not been accepted with a token that is known here (huggingface.co/{repository})",
            )
        reason = (str(error).strip() or "no reason").splitlines()[0]
        return (
            False,
            f"the local cache does not have them, and the hub gave no answer ({type(error).__name__}: {reason})",
        )
    return True, "the hub answers for its files"


def _is_complete(index: Path) -> bool:
    """Tell whether a folder of the cache has all weights of every part that the pipeline's index names."""
    try:
        parts = json.loads(index.read_bytes())
        named = [part for part in WEIGHTS if parts.get(part, [None])[0]]
    except (OSError, ValueError, AttributeError, TypeError, LookupError):
        return False
    return bool(named) and all(_has_weights(index.parent / part) for part in named)


def _has_weights(folder: Path) -> bool:
    files = [file.name for file in folder.glob("*.safetensors") if file.is_file()]  # a cache can hold broken links
    pieces = [int(match[1]) for name in files if (match := _SHARD.search(name))]
    return len(files) > len(pieces) or len(pieces) >= max(pieces, default=1)
