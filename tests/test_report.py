"""The pages about runs: what stands on them, that they load nothing, and that a browser shows them."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
from html_checker import checked

import flowrl
from flowrl.pages.charts import LEFT, MOST_POINTS, RIGHT, WIDTH, Mark, Series, chart, label, legend, ticks
from flowrl.pages.run_files import RunFiles
from flowrl.pages.run_page import run_page, write_report
from flowrl.pages.runs_page import runs_page
from flowrl.report import main
from flowrl.runs.logs import WARNINGS, telling_warnings


@pytest.fixture
def run(tiny_runs: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_runs["lora"], tmp_path / "run"))


def test_the_page_of_a_run(run: Path) -> None:
    (run / WARNINGS).write_text("too <few> samples\n")
    found = checked(write_report(run).read_text())
    for expected in ("orw_w2", "sd3-compress", "mini-sd3", "algo.lora_rank = 4", "too <few> samples", "reference"):
        assert expected in found.text, expected
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert f"{evaluation['reward_mean']:.4g}" in found.text
    assert f"{evaluation['reference']['diversity']:.4g}" in found.text
    assert "It had been trained on 16 samples." in found.text
    assert found.tags.count("img") == 1
    assert found.tags.count("svg") == 3 * 6 + 1  # six metrics against three axes, and the path


def test_rewards_by_prompt(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    per_prompt = evaluation["per_prompt"]
    assert sum(row["n"] for row in per_prompt) == evaluation["n_samples"]
    for side, mean in (("trained", evaluation["reward_mean"]), ("reference", evaluation["reference"]["reward_mean"])):
        total = sum(row["n"] * row[side] for row in per_prompt)
        assert total / evaluation["n_samples"] == pytest.approx(mean, rel=1e-4)
    found = checked(run_page(RunFiles.read(run)))
    assert f"Reward by prompt ({len(per_prompt)})" in found.text
    assert per_prompt[0]["prompt"] in found.text


def test_a_page_before_anything_was_computed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"algorithm": "other.module:Algo", "environment": null, "settings": {}}')
    found = checked(write_report(tmp_path).read_text())
    assert "There are no metrics yet" in found.text
    assert "an object" in found.text


def test_names_cannot_break_the_page(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["environment"]["settings"]["prompts"] = ["</pre><script>alert(1)</script>"]
    (run / "config.json").write_text(json.dumps(config))
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["per_prompt"][0]["prompt"] = '"><script>'
    evaluation["warnings"] = ["<b>"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    checked(run_page(RunFiles.read(run)))


def test_curves_against_time() -> None:
    rows = [{"time/total_timesteps": 100.0 * i, "time/samples_per_second": 50.0 * i} for i in (1, 2, 3)]
    run = RunFiles("a", {}, rows, {}, b"", [])
    assert run.along("samples") == [100, 200, 300]
    assert [round(3600 * h, 6) for h in run.along("hours")] == [2.0, 3.0, pytest.approx(3 + 2 / 3, abs=1e-5)]
    assert all(math.isnan(n) for n in run.along("evaluations"))


def test_comparing_runs(tiny_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "both.html"
    assert main([str(tiny_runs["lora"]), str(tiny_runs["full"]), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    found = checked(out.read_text())
    assert "algo.lora_rank" in found.text
    assert "algo.n_samples" not in found.text.split("Training")[0]  # the same in both
    assert found.tags.count("polyline") >= 2 * 3 * 6
    assert found.tags.count("img") == 2


def test_a_comparison_tells_what_runs_have_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cell is of a setting that the algorithm has not; runs of one name are told apart by their places."""
    monkeypatch.chdir(tmp_path)
    default = asdict(flowrl.ORWCFMW2.Config())
    for place, name, settings in (
        ("x", "orw_w2", {**default, "tau": 0.25}),
        ("y", "orw_w2", default),
        ("z", "ddpo", asdict(flowrl.DDPO.Config())),
    ):
        (tmp_path / place / "run").mkdir(parents=True)
        config = {"algorithm": name, "environment": {"name": "e", "settings": {}}, "settings": settings, "seed": 0}
        (tmp_path / place / "run" / "config.json").write_text(json.dumps(config))
    assert main(["x/run", "y/run", "z/run"]) == 0
    rows = re.findall(r"<tr>(.*?)</tr>", Path("comparison.html").read_text(), re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert cells[0][:3] == ["run", "algorithm", "algo.tau"]
    assert [row[0] for row in cells[1:]] == ["x/run", "y/run", "z/run"]
    assert [row[2] for row in cells[1:]] == ["0.25", str(default["tau"]), ""]
    assert "algo.clip_range" not in cells[0]  # at its default


def test_a_run_and_one_without_an_evaluation(tiny_runs: dict[str, Path], run: Path) -> None:
    for name in ("evaluation.json", "before_after.png"):
        (run / name).unlink()
    found = checked(runs_page([RunFiles.read(folder) for folder in (tiny_runs["full"], run)]))
    assert found.tags.count("img") == 1


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        ([], "Name a run folder"),
        ([str(tmp_path)], "is no run folder"),
    ):
        assert main(arguments) == 2
        assert expected in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    assert main([str(tmp_path), "--out", str(tmp_path / "file" / "a.html")]) == 2
    assert "Choose another place with --out" in capsys.readouterr().err


def test_warnings_are_said_in_a_line_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = warnings.showwarning
    with telling_warnings(tmp_path):
        for _ in range(2):
            warnings.showwarning(UserWarning("low\n  ESS"), UserWarning, "/x/flowrl/training/algorithm.py", 3)
        with pytest.warns(DeprecationWarning, match="old"):
            warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert warnings.showwarning is plain
    assert (tmp_path / WARNINGS).read_text() == "low ESS\n"
    assert capsys.readouterr().out == "warning: low ESS\n" * 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([1234, 56000], ["0", "20k", "40k", "60k"]),
        ([0.12, 0.13], ["0.120", "0.122", "0.124", "0.126", "0.128", "0.130"]),
        ([-5, 100], ["-50", "0", "50", "100"]),
        ([3, 3], ["1", "2", "3", "4", "5"]),
    ],
)
def test_ticks(values: list[float], expected: list[str]) -> None:
    found = ticks(values, 5)
    assert [label(tick, found) for tick in found] == expected
    assert found[0] <= min(values)
    assert found[-1] >= max(values)


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 0.7, 33.0, 1e5, 1e12])
def test_ticks_are_few_and_differ(scale: float) -> None:
    found = ticks([-0.31 * scale, 0.77 * scale], 5)
    assert 3 <= len(found) <= 8
    assert len({label(tick, found) for tick in found}) == len(found)


def test_a_chart() -> None:
    line = Series("a<b", [(0, 1), (1, math.nan), (2, 3)], marks_end=True)
    drawn = chart("reward & more", [line, Series("empty", [(0, math.inf)])], "samples")
    checked(drawn)
    assert drawn.count("<polyline") == 1
    assert "a&lt;b: 3" in drawn
    points = re.search(r'points="([^"]*)"', drawn)
    assert points
    assert len(points[1].split()) == 2
    assert "no values" in chart("t", [Series("none", [])], "x")
    long = chart("t", [Series("long", [(i, i) for i in range(10 * MOST_POINTS)])], "x")
    points = re.search(r'points="([^"]*)"', long)
    assert points
    assert len(points[1].split()) == MOST_POINTS
    assert "s1" in legend(["a", "b"])


def test_marks_and_limits_of_a_chart() -> None:
    inside = Mark((0.5, 0.5), "told <b>", data={"told": '"quoted"'})
    series = Series("a", [(0, 0), (1, 1), (9, 9)], marks=[inside, Mark((9, 0), "star", symbol="*")], colour=3)
    drawn = chart("t", [series], "x", limits=((0, 1), (0, 1)))
    checked(drawn)
    (circle,) = re.findall(r"<circle [^>]*>", drawn)
    assert 'class="end s3" tabindex="0" data-told="&quot;quoted&quot;"' in circle
    right, middle = WIDTH - RIGHT, LEFT + (WIDTH - LEFT - RIGHT) / 2
    assert f'cx="{middle:.1f}"' in circle
    path, star = re.search(r'points="([^"]*)"', drawn), re.search(r'<text x="([^"]*)"[^>]*>\*<title>star', drawn)
    assert path
    assert star
    assert path[1].split()[-1] == path[1].split()[-2]  # far out is on the border
    assert float(star[1]) == right


def browser() -> str | None:
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@pytest.mark.skipif(browser() is None, reason="no Chromium here")
def test_a_browser_shows_the_page_without_complaint(run: Path, tmp_path: Path) -> None:
    """The plots have a size, one of three axes is shown, nothing is wider than a phone, the console is silent."""
    measure = """<script>window.addEventListener("load", () => {
      const seen = [...document.querySelectorAll("svg.chart")].filter(s => s.getBoundingClientRect().height > 100);
      const curves = seen.filter(s => s.querySelector("polyline, circle"));
      document.getElementById("by-hours").click();
      const hours = document.querySelector(".hours").getBoundingClientRect().height;
      document.body.dataset.found = [seen.length, curves.length, hours > 100,
        document.documentElement.scrollWidth <= window.innerWidth, document.images[0].naturalWidth > 10].join(" ");
    });</script></body>"""
    file = write_report(run)
    file.write_text(file.read_text().replace("</body>", measure))
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--window-size=500,900", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)  # type: ignore[list-item]
    assert 'data-found="7 7 true true true"' in done.stdout
    assert "CONSOLE" not in done.stderr
