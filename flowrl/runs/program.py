"""What all programs share: the options of several of them, errors in one line, exit codes."""

from __future__ import annotations

import atexit
import gc
import io
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TextIO, TypeVar

import tyro

from flowrl.distributed.ranks import is_launched, place_in_job
from flowrl.errors import ConfigError, FlowRLError, out_of_memory
from flowrl.models.compiling import why_uncompiled
from flowrl.registry import own_module
from flowrl.runs.logs import discard_output, telling_warnings

EXIT_ERROR, EXIT_STOPPED = 2, 3
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 128 + 2, 128 + 13
"""As a shell reports SIGINT and SIGPIPE."""

OwnModules = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        help="Modules of your own to import first: they register algorithms, environments and rewards, which options "
        "and files can then name. What only a file names is never imported."
    ),
]
Device = Annotated[str, tyro.conf.arg(help="Where to compute: auto, cpu, cuda, cuda:1, mps.")]
AlgorithmOfRun = Annotated[
    str, tyro.conf.arg(help="Algorithm of a run trained with a class that is not registered: module:Class.")
]
EnvironmentOfRun = Annotated[
    str,
    tyro.conf.arg(help="Environment of a run trained on an environment that --modules does not bring: module:name."),
]

Config = TypeVar("Config")


@dataclass(frozen=True)
class OwnCode:
    """The option of every program that is read before all others."""

    modules: OwnModules = ()


def run_program(
    prog: str, config: type[Config], body: Callable[[Config], int], args: Sequence[str] | None, divides: bool = False
) -> int:
    """Parse a command line, run a program with it, and give its exit code; see `guarded`.

    Args:
        prog: How the program is started, for its help.
        config: Dataclass of its options.
        body: The program.
        args: The command line; that of this process when None.
        divides: As in `guarded`.
    """
    return guarded(lambda given: body(tyro.cli(config, args=given, prog=prog)), args, divides)


def guarded(body: Callable[[list[str]], int], args: Sequence[str] | None, divides: bool = False) -> int:
    """Import the user's modules, run a program on its command line, and give its exit code.

    `divides`: several processes divide its work. Those of another program would each do all of it, in the same files.
    An error that a user can cause, and a warning of flowrl's own, is one line on stderr. Of several processes the one
    that has an error ends at once: a tidy end would wait for the others, or abort. There is no traceback of Ctrl-C or
    of `... | head` either.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started it, or pythonw
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name in another script ends no run
    warnings.filterwarnings("ignore", message=".*rich is experimental.*")
    atexit.register(gc.freeze)  # else a last look at all that torch imported takes a third as long as its import
    try:
        try:
            return _run(body, list(sys.argv[1:] if args is None else args), divides)
        finally:
            print(end="", flush=True)  # an error of writing comes now, not at the end of the process
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout):
            raise  # another pipe broke
        discard_output()
        return EXIT_BROKEN_PIPE


def _has_no_reader(stream: TextIO) -> bool:
    """Tell whether a stream is a pipe whose reader is gone, also where nothing is left to be written to it."""
    try:
        stream.flush()
        number = stream.fileno()
    except BrokenPipeError:
        return True
    except OSError:  # no stream of the operating system's
        return False
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(body: Callable[[list[str]], int], args: list[str], divides: bool) -> int:
    try:
        with telling_warnings(None, lambda text: print(text, file=sys.stderr, flush=True)):
            if "" not in sys.path and not getattr(sys.flags, "safe_path", False):
                sys.path.append("")  # the current folder, which `python -m` has on it and an installed program has not
            if is_launched() and not divides:
                raise ConfigError(
                    f"This program works in one process, and {os.environ['WORLD_SIZE']} were started: start it without "
                    "torchrun or accelerate launch, and without WORLD_SIZE in the environment."
                )
            import_own_modules(args)
            return body(args)
    except FlowRLError as error:
        code, message = EXIT_ERROR, f"error{place_in_job()}: {error}"
    except KeyboardInterrupt:
        code, message = EXIT_INTERRUPTED, f"stopped{place_in_job()}"
    except Exception as error:
        if not (reason := why_uncompiled(error) or out_of_memory(error)):
            raise
        code, message = EXIT_ERROR, f"error{place_in_job()}: {reason}"
    print(message, file=sys.stderr, flush=True)
    if is_launched():
        sys.stdout.flush()
        os._exit(code)
    return code


def import_own_modules(args: Sequence[str]) -> None:
    """Import what `--modules` names.

    Raises:
        UnknownNameError: A module cannot be imported.
    """
    if not any(arg.startswith("--modules") for arg in args):  # without a parser, which takes longer than a listing
        return
    found, _ = tyro.cli(OwnCode, args=args, add_help=False, return_unknown_args=True)
    for name in found.modules:
        own_module(name)
