"""Errors a user can cause. Each message says what was expected, what came, and the remedy."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator

import torch

LONGEST_NAME = 200
"""Characters of an unknown name that are repeated."""
FEWER = (
    "Draw fewer samples at once: flowrl.sample and flowrl.evaluate take --batch-size 1, flowrl.run takes "
    "--algo.rollout-batch-size; what a run needs is predicted by its --dry-run, with what to lower."
)


class FlowRLError(Exception):
    """Base of all errors raised on purpose by flowrl."""


class UnknownNameError(FlowRLError, LookupError):
    """A name (algorithm, environment, field) that is not registered."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Make an error for an unknown `name`, with the closest and all known names."""
        known = sorted(known)
        shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
        return cls(f"Unknown {kind} '{shown}'.{did_you_mean(shown, known)} Known: {', '.join(known)}.")


class ConfigError(FlowRLError, ValueError):
    """A setting that has no meaning, or settings that contradict each other."""


class RewardError(FlowRLError, ValueError):
    """A reward that raised, or returned something other than one finite float per sample."""


class ModelLoadError(FlowRLError, OSError):
    """A flow model that cannot be loaded (missing files, no network, wrong architecture)."""


class CheckpointError(FlowRLError, OSError):
    """A checkpoint or run folder that is damaged, incomplete or does not fit."""


class HubError(FlowRLError, OSError):
    """An upload that did not reach the Hugging Face hub, or that the hub refused."""


class RankError(FlowRLError, RuntimeError):
    """Another process of the same job ended, or cannot be reached."""


class DeviceError(FlowRLError, RuntimeError):
    """A device that this machine does not have."""


class OutOfMemoryError(FlowRLError, MemoryError):
    """The device has no memory left."""


class NonFiniteError(FlowRLError, FloatingPointError):
    """A weight, loss or gradient that is not finite."""


@contextlib.contextmanager
def raised_by(whose: str, kind: type[FlowRLError] = ConfigError) -> Iterator[None]:
    """Raise an error of this kind, which says whose it is, where code of the user's own raises any."""
    try:
        yield
    except FlowRLError:
        raise
    except Exception as error:
        raise kind(f"{whose} raised {reason_of(error)}") from error


def tell_whose(error: BaseException, whose: str) -> None:
    """Say below an error's traceback in whose code it was raised (from Python 3.11 on)."""
    if sys.version_info >= (3, 11):
        error.add_note(f"Raised in {whose}.")


def in_a_line(error: BaseException) -> str:
    """Name an error, with the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0]}"


def reason_of(error: BaseException) -> str:
    """Name an error of the user's own code, with its message; where memory ended, say what to do, too."""
    reason = f"{type(error).__name__}: {str(error) or 'no reason'}."
    return f"{reason} {FEWER}" if out_of_memory(error) else reason


def out_of_memory(error: BaseException, remedy: str = FEWER) -> OutOfMemoryError | None:
    """Explain an allocation that failed, on whichever device; None for any other error."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
        return None
    return OutOfMemoryError(f"There is no memory left ({in_a_line(error)}). {remedy}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask whether the closest known name was meant; an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
