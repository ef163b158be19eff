"""Imports that fail inside diffusers or transformers: errors that name the first failure, not the files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flowrl.errors import ModelLoadError


@contextmanager
def importing() -> Iterator[None]:
    """Turn what the lazy imports of these libraries raise into one error.

    Raises:
        ModelLoadError: An import within failed; names the first that did.
    """
    try:
        yield
    except Exception as error:
        if (failed := first_failure(error)) is None:
            raise
        raise ModelLoadError(failed) from error


def first_failure(error: BaseException) -> str | None:
    """Say which import failed first, where an error of loading is none of the files; None where it is."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    if not any(isinstance(link, ImportError) or "Failed to import" in str(link) for link in chain):
        return None
    first = chain[-1]
    reason = (str(first).strip() or "no reason").splitlines()[0]
    return (
        "A library cannot be imported here; what failed first was "
        f"{type(first).__name__}: {reason}. The files are not at fault. Mend that package: it is missing, or built for "
        "another version (a torchvision of another build than torch, say: install the one of this torch, or none)."
    )
