"""Imports that are put off: stand-ins become the real thing when they are used, and leave nothing behind."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl.models import put_off
from flowrl.models.put_off import imports_put_off, without_garbage_collection

HEAVY = """
SETTING = {"a": 1}
class Layer: pass
class Other(Layer): pass
def double(x): return 2 * x
def allow_in_graph(fn): fn.allowed = True; return fn
"""


@pytest.fixture
def heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that is put off, with a module in it."""
    name = f"heavy_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "layers.py").write_text(HEAVY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(put_off, "PUT_OFF", (name,))
    yield name
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


def take(heavy: str, code: str) -> dict[str, object]:
    """What a module gets that imports the package while its import is put off."""
    found: dict[str, object] = {}
    with imports_put_off():
        exec(code.format(heavy), found)  # noqa: S102
    assert heavy not in sys.modules
    return found


def test_functions_classes_and_tables_are_the_real_ones_once_they_are_used(heavy: str) -> None:
    found = take(heavy, "from {0}.layers import double, Layer, SETTING")
    assert found["double"](4) == 8
    from importlib import import_module

    real = import_module(f"{heavy}.layers")
    assert isinstance(real.Other(), found["Layer"])
    assert not isinstance(3, found["Layer"])
    assert issubclass(real.Other, found["Layer"])
    assert found["SETTING"]["a"] == 1
    assert "a" in found["SETTING"]
    assert found["SETTING"] == real.SETTING
    assert type("Mine", (), {}) is not type(found["Layer"]())
    assert type(found["Layer"]()) is real.Layer


def test_nothing_is_of_a_class_that_nobody_imported(heavy: str) -> None:
    found = take(heavy, "from {0}.layers import Layer")
    assert not isinstance(object(), found["Layer"])
    assert heavy not in sys.modules


def test_a_module_that_was_taken_is_the_real_one_afterwards(heavy: str) -> None:
    found = take(heavy, "import {0}.layers as layers")
    assert found["layers"].double(1) == 2
    assert found["layers"].__class__.__name__ == "_StandIn"
    assert sys.modules[f"{heavy}.layers"].double is found["layers"].double


def test_what_is_used_meanwhile_is_imported_at_once(heavy: str) -> None:
    found: dict[str, object] = {}
    with imports_put_off():
        exec(f"from {heavy}.layers import double, Layer\nclass Mine(Layer): pass\ny = double(3)", found)  # noqa: S102
        assert found["y"] == 6
        assert f"{heavy}.layers" in sys.modules
    assert f"{heavy}.layers" in sys.modules
    assert found["Mine"].__mro__[1] is sys.modules[f"{heavy}.layers"].Layer


def test_what_is_not_there_stays_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(put_off, "PUT_OFF", ("no_such_package",))
    with imports_put_off(), pytest.raises(ModuleNotFoundError):
        import no_such_package  # noqa: F401


def test_what_is_imported_already_is_left_alone() -> None:
    import scipy

    with imports_put_off():
        import scipy as again
    assert again is scipy


def test_garbage_is_collected_again_afterwards() -> None:
    with without_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


COMPILER = """
import sys, torch, flowrl
from flowrl.models.imports import looked_up
from flowrl.models.put_off import PUT_OFF
network = looked_up("diffusers", "SD3Transformer2DModel")
print([name for name in PUT_OFF if name in sys.modules and name != "scipy"])
from diffusers.models.attention import JointTransformerBlock
from diffusers.utils.torch_utils import maybe_allow_in_graph
import torch._dynamo
print(type(torch._dynamo).__name__, torch._dynamo.trace_rules.is_callable_allowed(JointTransformerBlock))
import peft
from diffusers.hooks.layerwise_casting import BaseTunerLayer
from peft import LoraConfig, inject_adapter_in_model
layer = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(2, 2)))[0]
print(isinstance(layer, BaseTunerLayer), isinstance(torch.nn.Linear(2, 2), BaseTunerLayer))
"""


def test_diffusers_is_looked_up_without_them_and_works_with_them() -> None:
    """Blocks that diffusers marks for torch's compiler are marked as soon as that is imported."""
    done = subprocess.run([sys.executable, "-c", COMPILER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "module True", "True False"]
