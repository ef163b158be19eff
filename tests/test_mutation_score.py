"""The list of `mutation_score.py` fits the code as it is; the script itself takes minutes."""

from __future__ import annotations

import ast

import pytest
from conftest import REPOSITORY
from mutation_score import MUTATIONS, Mutation, main


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_mutations_can_be_applied(mutation: Mutation) -> None:
    """The old text occurs once, the new one is Python, and the tests that should notice are there."""
    text = (REPOSITORY / mutation.file).read_text(encoding="utf-8")
    changed = mutation.applied(text)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    for test in mutation.tests:
        file, _, name = test.partition("::")
        tests = ast.parse((REPOSITORY / "tests" / file).read_text(encoding="utf-8"))
        defined = {node.name for node in tests.body if isinstance(node, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in defined


def test_names_are_unique() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_text_that_is_gone_or_is_there_twice_is_an_error() -> None:
    mutation = Mutation("a", "b.py", "x + 1", "x - 1", ())
    assert mutation.applied("y = x + 1") == "y = x - 1"
    for text in ("y = x", "y = x + 1 + x + 1"):
        with pytest.raises(ValueError, match="not once"):
            mutation.applied(text)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "weight-sign"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["weight-sign", "flowrl/functional/losses.py"]
    with pytest.raises(SystemExit):
        main(["--only", "no-such-mutation"])
