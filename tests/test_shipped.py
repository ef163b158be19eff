"""What ships, by name: nothing is imported before it is asked for, and the table says what the classes say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from conftest import REPOSITORY, forgetting

import flowrl
from flowrl.errors import ConfigError
from flowrl.registry import ALGORITHMS, register_algorithm
from flowrl.shipped import SHIPPED
from flowrl.training.algorithm import FlowAlgorithm

STEPS = {
    "import contextlib, flowrl": [],
    "import flowrl.run; flowrl.run.main([])": [],
    """
class Mine(flowrl.FlowAlgorithm):
    def loss(self, batch): ...
try:
    flowrl.register_algorithm("nft")(Mine)
except flowrl.errors.ConfigError as error:
    assert "An algorithm 'nft' is registered already: NFT" in str(error)
""": [],
    "with contextlib.suppress(SystemExit): flowrl.run.main(['--algo=nft', '--help'])": ["baselines.nft"],
    "flowrl.RVM": ["baselines.nft", "baselines.rvm"],
    "flowrl.algorithm_class('orw')": ["baselines.nft", "baselines.rvm", "orw_w2"],
}
"""What a fresh interpreter does, and the modules of algorithms that it has imported after each step."""


def test_only_what_is_asked_for_is_imported() -> None:
    heads = ("flowrl.baselines.", "flowrl.orw_w2", "flowrl.tilt")
    look = f"import json, sys; print('SEEN', json.dumps(sorted(m for m in sys.modules if m.startswith({heads}))))"
    code = "\n".join(f"{step}\n{look}" for step in STEPS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line.removeprefix("SEEN ")) for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert seen == [[f"flowrl.{name}" for name in names] for names in STEPS.values()]


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
    """Whatever is in `baselines/`: a file that the table lacks would never be imported."""
    own = {name for name, cls in ALGORITHMS.items() if cls.__module__.startswith("flowrl.")}
    assert own == set(SHIPPED)
    files = {path.stem for path in (REPOSITORY / "baselines").glob("*.py")} - {"__init__"}
    known = {shipped.module.rpartition(".")[2] for shipped in SHIPPED.values()}
    assert known == files | {"orw_w2", "tilt"}
    with pytest.raises(AttributeError, match="no attribute 'NTF'"):
        flowrl.NTF  # noqa: B018


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
