"""The documentation: code blocks run, links lead somewhere, tables are those of the code, the site loads nothing else.

Blocks run as they stand, but smaller: `total_timesteps` and `n_samples` are cut to `LARGEST`, and programs that train
or evaluate get options of that size. Commands on images are parsed by the program's own parser, not run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import tyro
from conftest import forgetting
from pages import DOCS, PAGES, ROOT, blocks, commands, write_modules

import flowrl.run
from flowrl.registry import ALGORITHMS, ENVIRONMENTS

LARGEST = 32
SMALLER = re.compile(r"(total_timesteps|n_samples|learn\()=?(\d[\d_]*)")
LANGUAGES = {"bash", "python", "json", "text"}
RUN_PAGES = {
    f"docs/{page}.md"
    for page in (
        "quickstart",
        "algorithms/steering",
        "how-to/reward",
        "how-to/algorithm",
    )
}
"""Pages whose commands on points really run, one after the other."""
RUNS = ("flowrl.run", "flowrl.evaluate", "flowrl.sample", "flowrl.report")
HUB = re.compile(r"(stabilityai|black-forest-labs|openai)/")
NO_MKDOCS = "the site needs mkdocs-material (extra [docs])"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def tool(name: str) -> ModuleType:
    """A module of docs/tools."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "tools" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where the pages' own modules can be imported from; what they register is forgotten afterwards."""
    folder = tmp_path_factory.mktemp("docs")
    names = [name for page in PAGES for name in write_modules(page, folder)]
    with pytest.MonkeyPatch.context() as patch, forgetting(*names):
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("FLOWRL_REWARD_TOKEN", "token")
        yield folder


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    """The run folders that commands name."""
    small = ["--algo.n-samples", "32", "--total-timesteps", "32", "--eval-samples", "32", "--picture-every", "100"]
    for name in ("NAME", "OTHER"):
        assert flowrl.run.main(["--algo", "orw", "--env", "gaussians-linear", *small, "--name", name]) == 0
    return place / "runs"


def smaller(code: str) -> str:
    """The same code with few samples."""
    return SMALLER.sub(lambda match: match[0].replace(match[2], str(min(int(match[2]), LARGEST))), code)


def of(language: str) -> list[Path]:
    return [
        page
        for page in PAGES
        if any((b.is_shell if language == "bash" else b.language == language) for b in blocks(page))
    ]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ------------------------------------------------------------------------------------------------ code blocks


@pytest.mark.parametrize("page", of("python"), ids=named)
def test_python_blocks_run(page: Path, place: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.language != "python":
            continue
        code = compile(ast.parse(smaller(block.text)), block.name, "exec")
        if block.why:
            continue
        if block.module:
            importlib.import_module(block.module)
        else:
            exec(code, namespace)  # noqa: S102


class Parsed(Exception):
    """The command line has been understood."""


def program(command: list[str]) -> tuple[str, list[str]] | None:
    """Module and arguments of a command that starts one of flowrl's programs."""
    for i, word in enumerate(command[:-1]):
        if word == "-m" and command[i + 1].startswith("flowrl."):
            return command[i + 1], command[i + 2 :]
    return None


def parse(module: str, arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    """Let a program parse its command line, and do nothing else."""
    plain: Callable[..., Any] = tyro.cli

    def cli(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        if kwargs.get("return_unknown_args"):
            return result
        raise Parsed

    with patch.context() as inner:
        inner.setattr(tyro, "cli", cli)
        with pytest.raises((Parsed, SystemExit)) as ended:
            importlib.import_module(module).main(arguments)
        assert isinstance(ended.value, Parsed) or ("--help" in arguments and ended.value.code == 0), arguments


def run_small(module: str, arguments: list[str]) -> None:
    """Run a program, with few samples."""
    sizes = {"flowrl.evaluate": ["--n-samples"]}
    if not {"--resume", "--dry-run"} & set(arguments):
        sizes["flowrl.run"] = ["--total-timesteps", "--eval-samples", "--algo.n-samples"]
    cut = [word for option in sizes.get(module, ()) for word in (option, str(LARGEST))]
    assert importlib.import_module(module).main([*arguments, *cut]) == 0, arguments  # the last value counts


def is_vouched_for(command: list[str]) -> bool:
    """Whether a command is tested, parsed at least; not so for other people's programs and what needs the network."""
    if command[0] == "export" or "=" in command[0]:
        return True
    if command[0] != "python":
        return False
    found = program(command)
    if found is None:
        return command[1].endswith(".py")
    _, arguments = found
    uploads = "--push-to-hub" in arguments and "--dry-run" not in arguments
    return not uploads and not any(HUB.match(a.rpartition("=")[2]) for a in arguments)


def check_script(command: list[str]) -> None:
    """A script is there, and its source has the options."""
    source = (ROOT / command[1]).read_text()
    for word in command[2:]:
        if word.startswith("--"):
            assert f'"{word}"' in source or word[2:].replace("-", "_") in source, command


@pytest.mark.parametrize("page", of("bash"), ids=named)
def test_shell_blocks_run_or_are_parsed(page: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(page):
        for command in commands(block.text) if block.is_shell else ():
            found = program(command)
            if found is None:
                if command[0] == "python" and command[1].endswith(".py"):
                    check_script(command)
                continue
            module, arguments = found
            if not arguments:
                continue
            cheap = module in RUNS and not any(word.startswith(("sd3-", "plan-")) for word in arguments)
            if block.page in RUN_PAGES and cheap and not block.why:
                run_small(module, arguments)
            else:
                parse(module, arguments, monkeypatch)


def test_blocks_that_do_not_run_are_marked() -> None:
    """Those that cannot be tested here are exactly those marked `<!-- not run: WHY -->`; README.md has no marks."""
    shell = [b for page in PAGES if page.name != "README.md" for b in blocks(page) if b.is_shell]
    cannot = [b.name for b in shell if not all(is_vouched_for(command) for command in commands(b.text))]
    assert [b.name for b in shell if b.why] == cannot


def test_blocks_say_their_language() -> None:
    for page in PAGES:
        found = blocks(page)
        assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(found), page
        if DOCS in page.parents:
            assert {block.language for block in found} <= LANGUAGES, page


# -------------------------------------------------------------------------------------------- tables and links


def test_tables_are_those_of_the_code() -> None:
    tables = tool("tables")
    outdated = [named(page) for page in PAGES if tables.renewed(page.read_text()) != page.read_text()]
    assert outdated == [], "write them anew: python docs/tools/tables.py"


def test_tables_change_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tool("tables")
    monkeypatch.setattr(tables, "settings", None)
    rows = {row[0]: row for row in tables.KINDS["settings"]("rwr", "orw")}
    assert rows["`mode`"][1] == "`offline`"
    assert "`alpha`" not in rows  # the same as in orw
    text = "<!-- table: settings of all -->\nold\n<!-- end of table -->"
    assert "| `n_samples` | `512` | Samples drawn and scored per iteration. |" in tables.renewed(text)


def test_every_algorithm_and_environment_has_its_page() -> None:
    tables = tool("tables")
    for name, cls in ALGORITHMS.items():
        if tables.is_own(cls):
            page = DOCS / "algorithms" / f"{name}.md"
            assert page.exists(), f"write {named(page)}"
            assert f"(`{name}`)" in page.read_text().splitlines()[0]
    text = "".join(page.read_text() for page in PAGES if page.parent != ROOT)
    for name, spec in ENVIRONMENTS.items():
        if tables.is_shipped(spec):
            assert f"`{name}`" in text, f"no page names the environment {name}"


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_of_pages(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if urlsplit(link).scheme:
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_links_out_of_docs() -> None:
    """In the site CONTRIBUTING.md is a page, other files outside are text."""
    pytest.importorskip("mkdocs", reason=NO_MKDOCS)
    mended = tool("hooks").mended
    assert mended("[a](../CONTRIBUTING.md#rules)", "index.md") == "[a](contributing.md#rules)"
    assert mended("[a](../../CONTRIBUTING.md)", "how-to/model.md") == "[a](../contributing.md)"
    assert mended("see [the suite](../flowrl/suites/toy.toml), [b](x.md)", "index.md") == "see the suite, [b](x.md)"
    assert mended("[the\nformula](docs/algorithms.md)", "contributing.md") == "[the\nformula](algorithms.md)"
    assert mended("[a](https://b.c) ![d](../e.png)", "index.md") == "[a](https://b.c) ![d](../e.png)"
    with pytest.raises(FileNotFoundError, match="nothing"):
        mended("[a](../flowrl/nothing.py)", "index.md")


# ------------------------------------------------------------------------------------------------------ the site


class Page(HTMLParser):
    """Ids, links, what is loaded, and the paragraphs of a built page."""

    LOADING = ("script", "img", "iframe", "source", "video", "audio", "embed", "object", "link", "use")

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.styles = ""
        self.paragraphs: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.ids |= {values["id"]} if "id" in values else set()
        self.links += [values["href"]] if tag == "a" and "href" in values else []
        self.styles += values.get("style", "")
        if tag in self.LOADING:
            self.loaded += [values[key] for key in ("src", "href", "data", "srcset", "xlink:href") if key in values]
        if tag in ("p", "style"):
            self.inside = tag
            self.paragraphs += [""] if tag == "p" else []

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside == "p":
            self.paragraphs[-1] += data
        elif self.inside == "style":
            self.styles += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason=NO_MKDOCS)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def built(site: Path) -> dict[Path, Page]:
    pages = {}
    for file in site.rglob("*.html"):
        pages[file] = Page()
        pages[file].feed(file.read_text(encoding="utf-8"))
    return pages


def test_the_site_has_every_page(built: dict[Path, Page], site: Path) -> None:
    for page in PAGES:
        if DOCS in page.parents:
            assert site / page.relative_to(DOCS).with_suffix(".html") in built
    assert site / "contributing.html" in built
    assert not (site / "tools").exists()


def test_links_of_the_site(built: dict[Path, Page], site: Path) -> None:
    for file, page in built.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or file.name == "404.html":
                continue
            target = file if not parts.path else Path(posixpath.normpath(file.parent / unquote(parts.path)))
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{file.relative_to(site)}: {link}"
            if parts.fragment and target in built:
                assert parts.fragment in built[target].ids | {"__skip"}, f"{file.relative_to(site)}: {link}"


def test_the_site_loads_nothing_from_elsewhere(built: dict[Path, Page], site: Path) -> None:
    outside = re.compile(r"^(\w+:)?//")
    for file, page in built.items():
        assert [url for url in page.loaded if outside.match(url)] == [], file
        assert "http" not in page.styles, file
    for file in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", file.read_text()) == [], file


def test_markdown_is_understood(built: dict[Path, Page]) -> None:
    """Lists and tables that lack a blank line would be paragraphs."""
    for file, page in built.items():
        for paragraph in page.paragraphs:
            assert not re.search(r"^(\||- |\d\. |```|#)", paragraph, re.MULTILINE), f"{file}: {paragraph[:200]}"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""


PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  document.body.dataset.asked = performance.getEntriesByType("resource").map(entry => entry.name).join(" ");
}, 500));</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_a_browser_asks_no_other_host(site: Path, tmp_path: Path) -> None:
    """All that a page and its scripts ask for, by the browser's own account."""
    page = site / "algorithms" / "probe.html"
    page.write_text(page.with_name("orw_w2.html").read_text().replace("</body>", PROBE))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}/"
        options += ["--virtual-time-budget=5000", "--dump-dom", f"{host}algorithms/probe.html"]
        done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=120)
        server.shutdown()
    page.unlink()
    (asked,) = re.findall(r'data-asked="([^"]*)"', done.stdout)
    assert any(url.endswith(".js") for url in asked.split())
    assert [url for url in asked.split() if not url.startswith((host, "data:", "blob:"))] == []
