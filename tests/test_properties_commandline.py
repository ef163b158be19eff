"""Properties of the command line, of config.json and of the syntax of mixtures."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from properties import (
    fewer,
)

import flowrl
from flowrl.envs.rewards.mixture import Normalisation, PartSpec, parse_mixture
from flowrl.errors import ConfigError, UnknownNameError
from flowrl.registry import ALGORITHMS, ENVIRONMENTS, algorithm_class, environment_spec
from flowrl.run import main
from flowrl.runs.commandline import RunConfig, second_pass
from flowrl.storage.files import read_json, write_json
from flowrl.training.construction import check_idle

algorithms = st.sampled_from(sorted(ALGORITHMS))
words = st.text("abcXYZ019._-/ äé", min_size=1, max_size=8)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a setting's type."""
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        return st.lists(words.filter(lambda word: not word.startswith("-")), max_size=3).map(tuple)
    return {
        bool: st.booleans(),
        int: st.integers(-3, 2000),
        float: st.floats(allow_nan=False),
        str: words,
        Path: words.map(Path),
        int | None: st.none() | st.integers(0, 10**9),
        Path | None: st.none(),
    }[kind]


def printed(prefix: str, name: str, value: Any) -> list[str]:
    """A setting as one gives it on the command line."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{prefix}{'' if value else 'no-'}{option}"]
    if isinstance(value, tuple):
        return [f"--{prefix}{option}", *value]
    return [f"--{prefix}{option}={value}"]


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What a program prints to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


def parsed(algo: str, arguments: Sequence[str]) -> tuple[RunConfig, Any, Any]:
    told = ["--algo", algo, "--env", "gaussians-linear", *arguments]
    return second_pass(told, algorithm_class(algo), environment_spec("gaussians-linear"), None)


@pytest.mark.usefixtures("wide")
@settings(max_examples=60)
@given(algorithms, st.data())
def test_settings_that_are_printed_are_parsed_back(algo, data) -> None:
    """Any few settings of any algorithm: the same config from the command line as from Python, or the same error."""
    cls, spec = algorithm_class(algo), environment_spec("gaussians-linear")
    hints = get_type_hints(cls.Config)
    chosen = data.draw(
        st.lists(st.sampled_from([f.name for f in fields(cls.Config)]), min_size=1, max_size=4, unique=True)
    )
    given = {name: data.draw(values_of(hints[name]), label=name) for name in chosen}
    arguments = [text for name, value in given.items() for text in printed("algo.", name, value)]
    refusal = None
    try:
        expected = cls.configure(None, spec.recommended(spec.config), given)
        check_idle(expected, given, spec.recommended(spec.config))
    except ConfigError as error:
        refusal = str(error)
    if refusal is None:
        _, config, _ = parsed(algo, arguments)
        assert config == expected
        assert type(config) is cls.Config
    else:
        text = complaint(["--algo", algo, "--env", "gaussians-linear", "--dry-run", *arguments])
        assert "".join(refusal.split()) in "".join(text.replace("│", "").split())


RUN_FIELDS = [f.name for f in fields(RunConfig) if f.name not in ("algo", "env", "resume")]


@fewer
@given(st.sets(st.sampled_from(RUN_FIELDS), max_size=5).map(sorted), st.data())
def test_options_of_a_run_and_of_an_environment_are_parsed_back(chosen, data) -> None:
    hints = get_type_hints(RunConfig)
    given = {name: data.draw(values_of(hints[name]), label=name) for name in chosen}
    assume(all(not isinstance(value, int | float) or value > 0 or value is False for value in given.values()))
    assume(given.get("name", "a") not in (".", "..") and "/" not in given.get("name", ""))  # it is no path
    tau, flow_name = data.draw(st.floats(allow_nan=False)), data.draw(words)
    arguments = [text for name, value in given.items() if value is not None for text in printed("", name, value)]
    run, _, env = parsed("orw_w2", [*arguments, f"--env.tau={tau}", f"--env.flow={flow_name}"])
    assert run == RunConfig(**{"algo": "orw_w2", "env": "gaussians-linear", **given})
    assert (env.tau, env.flow) == (tau, flow_name)


@settings(max_examples=400)
@given(algorithms, st.data())
def test_settings_of_config_json_make_the_same_config(algo, data) -> None:
    """As a checkpoint is loaded: lists become tuples, everything else is as it was, infinities too.

    Settings without meaning are a ConfigError, never anything else.
    """
    cls = algorithm_class(algo)
    hints = get_type_hints(cls.Config)
    chosen = data.draw(
        st.lists(st.sampled_from([f.name for f in fields(cls.Config)]), min_size=1, max_size=4, unique=True)
    )
    given = {name: data.draw(values_of(hints[name]), label=name) for name in chosen}
    try:
        config = cls.Config(**given)
    except ConfigError:
        return
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", {"settings": asdict(config)})
        stored = read_json(Path(folder) / "config.json")["settings"]
    assert cls.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}) == config


@st.composite
def misspelt(draw: Any, known: Sequence[str]) -> tuple[str, str]:
    """A name, and the same with a letter left out, doubled, changed or exchanged with the next."""
    name = draw(st.sampled_from(known))
    place = draw(st.integers(0, len(name) - 2))
    head, one, other, tail = name[:place], name[place], name[place + 1], name[place + 2 :]
    wrong = draw(st.sampled_from([head + other + tail, head + one + one + other + tail, head + other + one + tail]))
    assume(wrong not in known and wrong)
    return name, wrong


def complaint(arguments: Sequence[str]) -> str:
    """What the program says to arguments that are wrong: exit code 2, and never a traceback."""
    with captured() as (out, err):
        try:
            code = main(list(arguments))
        except SystemExit as stopped:  # tyro ends the program itself
            code = stopped.code
    text = out.getvalue() + err.getvalue()
    assert code == 2
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Messages that are not broken over lines, and a folder that stays empty."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        patch.chdir(folder)
        yield
    assert list(folder.iterdir()) == []


def closest(text: str, known: Collection[str]) -> bool:
    """Whether a message asks "Did you mean 'NAME'?" with a name that there is."""
    _, _, rest = text.partition("Did you mean '")
    return rest.partition("'?")[0] in known


@pytest.mark.usefixtures("wide")
@fewer
@given(data=st.data())
def test_a_misspelt_name_is_an_error_that_names_a_known_one(data) -> None:
    """Of an algorithm, an environment or a setting; in the program, and in Python."""
    _, algo = data.draw(misspelt(sorted(ALGORITHMS)))
    text = complaint(["--algo", algo, "--env", "gaussians-linear", "--dry-run"])
    assert f"Unknown algorithm '{algo}'" in text
    assert closest(text, ALGORITHMS)
    _, env = data.draw(misspelt(sorted(ENVIRONMENTS)))
    text = complaint(["--algo", "orw", "--env", env, "--dry-run"])
    assert f"Unknown environment '{env}'" in text
    assert closest(text, ENVIRONMENTS)
    known = [f.name for f in fields(flowrl.ORWCFMW2.Config)]
    _, setting = data.draw(misspelt(known))
    with pytest.raises(UnknownNameError) as raised:
        flowrl.ORWCFMW2.configure(settings={setting: 1})
    assert closest(str(raised.value), known)


@pytest.mark.usefixtures("wide")
@fewer
@given(data=st.data())
def test_a_misspelt_option_is_an_error_that_names_the_right_one(data) -> None:
    known = [f"algo.{f.name.replace('_', '-')}" for f in fields(flowrl.ORWCFMW2.Config)]
    known += [f"env.{f.name}" for f in fields(environment_spec("gaussians-linear").config)]
    known += [name.replace("_", "-") for name in RUN_FIELDS]
    right, wrong = data.draw(misspelt(known))
    assume(not wrong.startswith("-"))
    text = complaint(["--algo", "orw_w2", "--env", "gaussians-linear", f"--{wrong}", "1", "--dry-run"])
    assert f"--{wrong}" in text
    assert f"--{right}" in text


parts = st.builds(
    PartSpec,
    st.sampled_from(["compress", "clip", "count", "my_rewards:nice", "a.b:c-d"]),
    st.booleans(),
    st.none() | st.decimals(-100, 100, places=3).map(float),
    st.sampled_from(get_args(Normalisation)),
)


@given(st.lists(parts, min_size=1, max_size=4, unique_by=lambda part: part.label))
def test_a_mixture_that_is_written_down_is_read_back(specs) -> None:
    def written(part: PartSpec) -> str:
        name = f"winrate({part.name})" if part.win_rate else part.name
        return name if part.weight is None else f"{name}:{part.weight}:{part.normalisation}"

    expected = [part if part.weight is not None else replace(part, normalisation="fixed") for part in specs]
    assert parse_mixture("+".join(map(written, specs))) == expected
