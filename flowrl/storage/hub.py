"""Upload an exported folder to the Hugging Face hub: the files that its `export.json` lists, and no others."""

from __future__ import annotations

import glob
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowrl.errors import ConfigError, HubError
from flowrl.storage.files import read_json

MANIFEST = "export.json"
"""Lists the files of an exported folder."""


def check_name(name: str) -> None:
    """Raise `ConfigError` for what cannot be the name of a repository on the hub; uses no network."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub takes OWNER/NAME, not '{name}': {error}") from error


def exported_files(folder: Path) -> list[str]:
    """List the files of an exported folder, relative to it.

    Raises:
        CheckpointError: The list of files is missing or damaged.
        ConfigError: A listed file is missing, or is a link or in a linked folder: that was not exported.
    """
    listed = read_json(folder / MANIFEST).get("files")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ConfigError(f"'{folder / MANIFEST}' lists no files: export the run again.")
    whole = folder.resolve()
    for name in listed:
        if not _is_file_of(whole, name):
            raise ConfigError(
                f"'{MANIFEST}' of '{folder}' lists {reprlib.repr(name)}, which is no file of that folder (missing, a "
                "link, or elsewhere). Nothing was uploaded; export the run again."
            )
    return sorted(listed)


def _is_file_of(folder: Path, name: str) -> bool:
    """Tell whether a file of that name lies in the folder itself, behind no link."""
    path = folder / name
    try:
        return path.resolve() == path and path.is_relative_to(folder) and path.is_file()
    except (OSError, ValueError, RuntimeError):  # longer than names can be, with NUL, a loop of links
        return False


def table(folder: Path, files: Iterable[str]) -> str:
    """Format a line for each file, with its size in bytes, and one for all."""
    sizes = {name: (folder / name).stat().st_size for name in files}
    lines = [f"{size:15,d}  {name}" for name, size in sorted(sizes.items())]
    return "\n".join([*lines, f"{sum(sizes.values()):15,d}  bytes in {len(sizes)} files"])


def push(folder: Path, name: str, *, private: bool = True, dry_run: bool = False) -> str:
    """Upload an exported folder to a model repository, which is made where there is none.

    Args:
        folder: A folder that `flowrl.export` wrote.
        name: OWNER/NAME; without OWNER the token's own account.
        private: Only the owner sees the repository.
        dry_run: Say what would be uploaded and where to; no network is used.

    Returns:
        What was done, for people.

    Raises:
        ConfigError: The name is none, or a listed file is not there.
        HubError: No token, no permission, no network, or a public repository where a private one was asked for.
    """
    check_name(name)
    files = exported_files(folder)
    kind = "private" if private else "public"
    lines = [f"{kind} model repository: {name}", table(folder, files)]
    if (others := _others(folder, files)) > 0:
        lines.append(f"left out: {others} files or links that the export did not write")
    if (called := read_json(folder / MANIFEST).get("name")) != name:
        lines.append(f"note: the card in README.md says to load '{called}'; edit it to say '{name}'")
    if dry_run:
        return "\n".join([*lines, "dry run: nothing was uploaded"])
    lines.append(f"uploaded: {_upload(folder, name, files, private)}")
    return "\n".join(lines)


def _others(folder: Path, files: list[str]) -> int:
    there = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return sum(path.relative_to(folder).as_posix() not in files for path in there)


def _upload(folder: Path, name: str, files: list[str], private: bool) -> str:
    """Make the repository and commit the files; the address of the commit."""
    import huggingface_hub

    if not huggingface_hub.get_token():
        raise HubError(
            "There is no token for the hub: set HF_TOKEN, or log in with `hf auth login`. It must be allowed to write "
            "(huggingface.co/settings/tokens)."
        )
    api: Any = huggingface_hub.HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repository).private:
            raise HubError(f"'{repository}' is public on the hub: add --public, or choose another name.")
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[glob.escape(file) for file in files],
            commit_message="Upload by flowrl.export",
        )
    except HubError:
        raise
    except Exception as error:  # the client's own, and those of whichever HTTP library it uses
        raise HubError(_message(name, error)) from error
    return str(getattr(commit, "commit_url", commit))


def _message(name: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if status == 401:
        remedy = "The hub does not accept the token: set HF_TOKEN to a valid one, or log in again with `hf auth login`."
    elif status in (403, 404):
        remedy = f"The token may not write there: check the owner in '{name}' and that the token has write access."
    elif status is not None:
        remedy = "The hub refused it; try again later, or upload the folder with `hf upload`."
    else:
        remedy = "Check the network (and HF_HUB_OFFLINE), then call it again with the exported folder."
    return f"Uploading to '{name}' failed: {reason} ({type(error).__name__}). {remedy}"
