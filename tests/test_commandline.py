"""What the command line says of algorithms and environments."""

from __future__ import annotations

import flowrl
from flowrl.registry import ALGORITHMS
from flowrl.runs.commandline import names


def test_an_algorithm_needs_no_docstring_to_be_listed() -> None:
    class Bare(flowrl.FlowAlgorithm):
        pass

    flowrl.register_algorithm("bare")(Bare)
    try:
        assert "  bare" in names().splitlines()
    finally:
        del ALGORITHMS["bare"]
