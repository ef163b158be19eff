"""Imports that are put off: stand-ins become the real thing when they are used, and leave nothing behind."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl.models.imports import without_garbage_collection
from flowrl.runs import put_off
from flowrl.runs.put_off import imports_put_off

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


DRY_RUN = """
import sys
from flowrl.runs import put_off
from flowrl.run import main
sys.argv = ["flowrl", "--algo", "orw_w2", "--env", "sd3-aesthetic", "--dry-run"]
code = main()
print([name for name in put_off.PUT_OFF if name in sys.modules and not isinstance(sys.modules[name], put_off._StandIn)])
sys.exit(code)
"""


def test_a_dry_run_imports_none_of_them() -> None:
    done = subprocess.run([sys.executable, "-c", DRY_RUN], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "peak: " in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_decorators_give_back_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = put_off._StandIn("torch._dynamo")
    monkeypatch.setitem(sys.modules, "torch._dynamo", compiler)
    assert compiler.disable(len) is len
    assert compiler.disable(recursive=False)(len) is len
    assert compiler.allow_in_graph(dict) is dict
