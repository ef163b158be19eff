"""The page that compares several runs: `python -m flowrl.report RUN RUN ...`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowrl.pages.charts import legend
from flowrl.pages.html import heading, page, table
from flowrl.pages.run_files import RunFiles, telling_damage
from flowrl.pages.text import count, number, setting, span
from flowrl.pages.training_charts import STYLE, before_after, training_charts


@telling_damage()
def runs_page(runs: Sequence[RunFiles]) -> str:
    """Write the page: a table of settings and results, the curves of all runs, their samples.

    Raises:
        ConfigError: Files of a run are damaged.
    """
    title = f"{len(runs)} runs"
    body = [
        heading(title, 1),
        legend([run.name for run in runs]),
        _overview(runs),
        heading("Training"),
        training_charts(runs),
        *(heading(run.name, 3) + before_after(run) for run in runs if run.before_after),
    ]
    return page(title, body, STYLE)


def _overview(runs: Sequence[RunFiles]) -> str:
    """Write a row for each run: its settings where runs differ, and its results.

    Settings are those that some run has other than its algorithm's default.
    """
    told = [
        {
            "algorithm": run.config.get("algorithm"),
            "environment": run.environment.get("name"),
            **run.settings,
            "seed": run.config.get("seed"),
        }
        for run in runs
    ]
    known = dict.fromkeys(key for given in told for key in given)
    settings = [
        {f"algo.{key}": value for key, value in run.config.get("settings", {}).items()} | given
        for run, given in zip(runs, told)
    ]
    differing = [key for key in known if len({str(given.get(key)) for given in settings}) > 1]
    head = ["run", *differing, "reward before", "after", "95 % interval"]
    head += ["diversity before", "after", "drift", "network evaluations"]
    rows = [
        [run.name, *(setting(given.get(key, "")) for key in differing), *_results(run)]
        for run, given in zip(runs, settings)
    ]
    return table(rows, head)


def _results(run: RunFiles) -> list[Any]:
    after, before = run.evaluation, run.reference
    return [
        number(before.get("reward_mean")),
        number(after.get("reward_mean")),
        span(after.get("reward_ci")),
        number(before.get("diversity")),
        number(after.get("diversity")),
        number(after.get("drift")),
        count(run.last.get("time/network_evaluations")),
    ]
