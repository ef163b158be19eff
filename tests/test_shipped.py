"""What ships, by name: nothing is imported before it is asked for, and the table says what the classes say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from conftest import forgetting

import flowrl
from flowrl.errors import ConfigError
from flowrl.registry import ALGORITHMS, register_algorithm
from flowrl.shipped import SHIPPED
from flowrl.training.algorithm import FlowAlgorithm

HELP = "import contextlib, flowrl.run\nwith contextlib.suppress(SystemExit): flowrl.run.main(['--algo=nft', '--help'])"
HEADS = ("flowrl.baselines.", "flowrl.orw_w2", "flowrl.tilt")


def imported_by(code: str) -> list[str]:
    """Modules of algorithms that a fresh interpreter has imported after this code."""
    code += f"\nimport json, sys; print(json.dumps([m for m in sys.modules if m.startswith({HEADS})]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import flowrl", []),
        ("import flowrl.run; flowrl.run.main([])", []),
        (HELP, ["flowrl.baselines.nft"]),
        ("import flowrl; flowrl.NFT", ["flowrl.baselines.nft"]),
        ("import flowrl; flowrl.algorithm_class('orw')", ["flowrl.orw_w2"]),
    ],
)
def test_only_what_is_asked_for_is_imported(code: str, expected: list[str]) -> None:
    assert imported_by(code) == expected


@pytest.mark.parametrize("name", SHIPPED)
def test_the_table_says_what_the_classes_say(name: str) -> None:
    cls = flowrl.algorithm_class(name)
    assert issubclass(cls, FlowAlgorithm)
    assert cls.name == name
    assert (cls.__module__, cls.__qualname__) == SHIPPED[name][:2]
    assert ALGORITHMS.summary(name) == (cls.__doc__ or "").partition("\n")[0]
    assert getattr(flowrl, SHIPPED[name].name) is cls
    assert SHIPPED[name].name in dir(flowrl)
    assert SHIPPED[name].name in flowrl.__all__


def test_every_algorithm_of_the_library_is_in_the_table() -> None:
    own = {name for name, cls in ALGORITHMS.items() if cls.__module__.startswith("flowrl.")}
    assert own == set(SHIPPED)
    with pytest.raises(AttributeError, match="no attribute 'NTF'"):
        flowrl.NTF  # noqa: B018


def test_a_name_that_ships_stays_taken_before_anything_is_imported() -> None:
    code = """
import flowrl
class Mine(flowrl.FlowAlgorithm):
    def loss(self, batch): ...
try:
    flowrl.register_algorithm("nft")(Mine)
except flowrl.errors.ConfigError as error:
    print(error)
"""
    assert imported_by(code.replace("print(error)", "assert 'registered already: NFT' in str(error)")) == []


def test_what_others_register_is_listed_beside() -> None:
    def loss(self: Any, batch: Any) -> Any: ...

    with forgetting():
        cls = register_algorithm("mine")(type("Mine", (FlowAlgorithm,), {"loss": loss, "__doc__": "Mine.\n\nMore."}))
        assert ALGORITHMS["mine"] is cls
        assert (ALGORITHMS.summary("mine"), len(ALGORITHMS)) == ("Mine.", len(SHIPPED) + 1)
        again = register_algorithm("mine")(type("Mine", (FlowAlgorithm,), {"loss": loss}))  # a cell run once more
        assert ALGORITHMS["mine"] is again
        with pytest.raises(ConfigError, match="'mine' is registered already: Mine"):
            register_algorithm("mine")(type("Other", (FlowAlgorithm,), {"loss": loss}))
    assert "mine" not in ALGORITHMS
