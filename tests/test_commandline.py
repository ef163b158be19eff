"""What the command line says of algorithms and environments."""

from __future__ import annotations

import pytest

import flowrl
from flowrl.errors import UnknownNameError
from flowrl.registry import ALGORITHMS, algorithms_with
from flowrl.runs.commandline import names, second_pass


def test_an_algorithm_needs_no_docstring_to_be_listed() -> None:
    class Bare(flowrl.ORWCFM):
        pass

    flowrl.register_algorithm("bare")(Bare)
    try:
        assert "  bare" in names().splitlines()
    finally:
        del ALGORITHMS["bare"]


def test_a_setting_of_other_algorithms_names_them() -> None:
    """By the API and on the command line, in both of its spellings; a name that is nobody's has the closest."""
    message = r"DDPO has no setting 'ghuber_power'; these have it: awm\.$"
    with pytest.raises(UnknownNameError, match=message):
        flowrl.DDPO("FlowPolicy", "gaussians-linear", ghuber_power=0.5)
    for given in ["--algo.ghuber-power", "0.5"], ["--algo.ghuber_power=0.5"]:
        with pytest.raises(UnknownNameError, match=message):
            second_pass(["--algo", "ddpo", *given], flowrl.DDPO, None, None)
    assert algorithms_with("tau") == [name for name in ALGORITHMS if hasattr(ALGORITHMS[name].Config(), "tau")]
    with pytest.raises(UnknownNameError, match="Did you mean 'ghuber_power'"):
        flowrl.algorithm_class("awm")("FlowPolicy", "gaussians-linear", ghuber_powr=0.5)
