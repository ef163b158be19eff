"""The shape of the code, held: import order, sizes, packages, nothing that runs foreign code."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LAYERS = [
    {"types", "errors", "checks", "version", "storage"},
    {"functional", "registry", "shipped", "config"},
    {"models", "envs"},
    {"training", "distributed"},
    {"orw_w2", "tilt", "baselines", "evaluation"},
    {"runs", "pages", "suites"},
    {"run", "evaluate", "sample", "export", "report", "benchmark", "serve"},
]
LAYER_OF = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Every module of the library by its import name; the symlinks are followed once."""
    found = {}
    for package, folder in (("flowrl", "flowrl"), ("flowrl.envs", "envs"), ("flowrl.baselines", "baselines")):
        for path in (REPOSITORY / folder).rglob("*.py"):
            parts = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            if package == "flowrl" and parts[0] in ("envs", "baselines", "assets"):
                continue
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def part(module: str) -> str:
    """`flowrl.models.sd3` -> `models`."""
    return module.split(".")[1] if "." in module else ""


def imports(name: str, nodes: Iterator[ast.AST]) -> set[str]:
    """Modules of flowrl that these nodes import, with `from package import module` resolved."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return {module for module in found if module.split(".")[0] == "flowrl"}


def at_run_time(tree: ast.AST, within_functions: bool = True) -> Iterator[ast.AST]:
    """All nodes but those under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if not within_functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from at_run_time(node, within_functions)


def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def test_every_module_has_a_layer() -> None:
    assert {part(name) for name in MODULES} - {""} <= LAYER_OF.keys()


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"flowrl"}))
def test_imports_point_one_way(name: str) -> None:
    """A module imports its own layer and those below it; a program may import the package itself."""
    level = LAYER_OF[part(name)]
    wrong = [
        module
        for module in imports(name, at_run_time(tree_of(name), within_functions=False))
        if (level < 6 if module == "flowrl" else LAYER_OF[part(module)] > level)
    ]
    assert not wrong, f"{name} is in {sorted(LAYERS[level])} and must not import {wrong}"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if part(n) in ("functional", "orw_w2", "baselines")))
def test_formulas_and_algorithms_do_not_know_the_processes(name: str) -> None:
    assert "distributed" not in {part(module) for module in imports(name, ast.walk(tree_of(name)))}


@pytest.mark.parametrize(("one", "other"), [("envs", "baselines"), ("baselines", "envs")])
def test_envs_and_baselines_never_import_each_other(one: str, other: str) -> None:
    """Not even inside functions."""
    mine = [name for name in MODULES if part(name) == one]
    assert mine
    for name in mine:
        assert other not in {part(module) for module in imports(name, ast.walk(tree_of(name)))}, name


def test_only_the_sd3_adapter_knows_diffusers() -> None:
    """Time and sign are converted in the adapters of flowrl/models and nowhere else."""
    for name in MODULES:
        for node in ast.walk(tree_of(name)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(n.split(".")[0] == "diffusers" for n in names):
                assert part(name) == "models", name


def test_packages_are_listed() -> None:
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert sorted(listed) == sorted(on_disk)
    for name, path in MODULES.items():
        assert path.name == "__init__.py" or name.rpartition(".")[0] in on_disk, f"{name} is in no package"


@pytest.mark.parametrize("name", ["envs", "baselines"])
def test_the_symlinks_lead_to_the_top_level_folders(name: str) -> None:
    link = REPOSITORY / "flowrl" / name
    assert link.is_symlink()
    assert link.resolve() == REPOSITORY / name
    assert not link.readlink().is_absolute()


@pytest.mark.parametrize("name", ["envs", "baselines"])
def test_top_level_folders_refuse_another_name(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert f"ImportError: Import this package as 'flowrl.{name}'" in done.stderr


def test_no_module_imports_itself_over_others() -> None:
    """Also not by an import inside a function."""
    imported = {name: imports(name, at_run_time(tree_of(name))) & MODULES.keys() - {name} for name in MODULES}
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


MOST_LINES = 300
MOST_LINES_OF = {"FlowAlgorithm": 200, "FlowPolicy": 160}


def code_lines(source: str) -> int:
    """Number of lines with code: no blank lines, comments and docstrings."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in layout]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, node.end_lineno + 1))
    return len(code)


def test_lines_of_code() -> None:
    source = '''"""A docstring
of two lines."""

# a comment
x = """text
that is code"""  # with a comment
"""What x is."""


def f(
    y,
):
    """Return y."""

    return y
'''
    assert code_lines(source) == 2 + 3 + 1


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_is_too_long(name: str) -> None:
    assert code_lines(MODULES[name].read_text(encoding="utf-8")) <= MOST_LINES, f"{name}: divide it"


@pytest.mark.parametrize(("cls", "name"), [("FlowAlgorithm", "algorithm"), ("FlowPolicy", "policy")])
def test_the_central_classes_stay_small(cls: str, name: str) -> None:
    source = MODULES[f"flowrl.training.{name}"].read_text(encoding="utf-8")
    (node,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == cls)
    assert code_lines(ast.get_source_segment(source, node) or "") <= MOST_LINES_OF[cls]


NO_VERBS = """
A All An Any As At Both By Each Either Every Everything Few For From How If In Its Many Most No None Nothing Of Offline
On One Others Several Some Such That The Their These This Those To What Whatever When Where Whether Which Who Whose With
Without First Second Fourth Actions Advantages Algorithm Background Batches Class Coefficient Components Connections
Content Contents Context Copies Deviations Difference Embeddings Entries Entry Environment Exact Features Fraction
Frozen Gradient Gradients Given Images Indices Latents Law Likeliest Lines Logarithm Logits Loss Mean Memory Names
Network Noise Noisy Numbers Parts Pictures Pixels Probability Prompts Random Raw Returns Rewards Rows Running Samples
Scalar Scalars Seconds Session Settings Shapes Size Spec Standard Standardised Statistics Status Stored Tensors Text
Texts Times Tokens Types Value Values Velocity Weights Analyses Checks Counts Draws Fills Finds Gives Makes Raises Reads
Scores Takes Tells Bytes Classes States Velocities Two Is Are
"""
"""Words that begin no order: pronouns, articles, prepositions, nouns, and verbs in another form."""
NOT_CALLED = {"property", "cached_property", "setter", "overload"}


def summaries(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Name and first word of the docstring of each function and method; not of properties, overloads, dunders."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or re.fullmatch("__.*__", node.name):
            continue
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        text = ast.get_docstring(node)
        if text and not decorators & NOT_CALLED:
            yield node.name, text.split()[0].rstrip(",.:;")


def test_first_words_are_found() -> None:
    source = '''
def area(x):
    """The area."""

class Square:
    """A square."""

    def __len__(self):
        """The sides."""

    @property
    def side(self):
        """The side."""

    @functools.cached_property
    def corner(self):
        """A corner."""

    @staticmethod
    async def turn(angle):
        """`angle` degrees to the left."""

    def quiet(self):
        return None
'''
    assert list(summaries(ast.parse(source))) == [("area", "The"), ("turn", "`angle`")]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_docstrings_of_functions_begin_with_a_verb(name: str) -> None:
    """A formula or a shape, in backticks or brackets, is no verb either."""
    wrong = [
        f"{function}: {word}"
        for function, word in summaries(tree_of(name))
        if word in NO_VERBS.split() or not word.replace("-", "").isalpha()
    ]
    assert not wrong, f"{name}: say what a call does, as an order: 'Give ...', 'Compute ...', 'Tell whether ...'"


END_TO_END = (
    *("orw_w2", "types", "training.method", "training.algorithm", "training.buffer", "training.policy"),
    *("functional.flow", "functional.solvers", "functional.losses"),
)
"""What one reads to know ORW-CFM-W2 from the noise to the gradient (CONTRIBUTING.md has the order)."""


def test_an_algorithm_is_read_end_to_end_in_a_thousand_lines() -> None:
    assert sum(code_lines(MODULES[f"flowrl.{name}"].read_text(encoding="utf-8")) for name in END_TO_END) <= 1000


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_runs_foreign_code(name: str) -> None:
    """No pickle, no trust_remote_code, no eval; torch.load reads weights only."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            assert not UNSAFE_MODULES & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNSAFE_MODULES
        elif isinstance(node, ast.Call):
            keywords = {k.arg: k.value for k in node.keywords}
            if "trust_remote_code" in keywords:  # left out, transformers would ask on a terminal
                assert ast.unparse(keywords["trust_remote_code"]) == "False"
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "os.system", "torch.save"}
            if called == "torch.load":
                assert ast.unparse(keywords["weights_only"]) == "True"


def test_import_is_light() -> None:
    """`import flowrl` brings in none of the heavy or optional libraries."""
    heavy = (
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
        "sklearn",
        "matplotlib",
        "tyro",
        "scipy",
        "httpx2",
    )
    before = "import sys, torch, stable_baselines3; before = set(sys.modules)"  # of which older ones bring matplotlib
    code = f"{before}; import flowrl; print([m for m in {heavy} if m in sys.modules.keys() - before])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def circle_through(name: str, graph: dict[str, set[str]]) -> list[str]:
    """Modules by which a module imports itself, in order; empty where there is no such way."""
    ways = [[name]]
    seen = set()
    while ways:
        way = ways.pop()
        for following in sorted(graph[way[-1]]):
            if following == name:
                return [*way, name]
            if following not in seen:
                seen.add(following)
                ways.append([*way, following])
    return []


def test_models_storage_and_environments_import_in_no_circle() -> None:
    """Not even inside functions: two modules that need each other are one, or want a third."""
    mine = {name for name in MODULES if part(name) in ("models", "storage", "envs")}
    graph = {name: imports(name, ast.walk(tree_of(name))) & mine for name in mine}
    circles = {name: circle for name in sorted(mine) if (circle := circle_through(name, graph))}
    assert not circles


UNIX_ONLY = {"fcntl", "grp", "pwd", "resource", "termios"}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_read_on_any_system(name: str) -> None:
    """Text files name their encoding, which is another one on other systems; what Unix alone has is imported inside."""
    tree = ast.parse(MODULES[name].read_text("utf-8"))
    for node in tree.body:
        assert not UNIX_ONLY & {alias.name for alias in getattr(node, "names", ()) if isinstance(node, ast.Import)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = {keyword.arg for keyword in node.keywords}
            n_before = {"read_text": 1, "write_text": 2}.get(node.func.attr, 0)
            assert not n_before or len(node.args) >= n_before or "encoding" in given, ast.unparse(node)
