"""What flowrl reaches on one GPU, beside bare loops and diffusers' own pipeline in the same process.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --quick --out gpu.json                      # about two minutes
    python benchmarks/gpu.py --baseline ../older                         # also an older checkout, in a child process
    python benchmarks/gpu.py --tiny                                      # on the CPU, to try the script

Networks are of full size with random weights; nothing is downloaded. A row that fails says so, and the others go on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows, in this order")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and the main rows only")
    parser.add_argument("--tiny", action="store_true", help="small networks, on the CPU")
    parser.add_argument("--out", type=Path, help="JSON file for the figures; rewritten after every row")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of flowrl's rows; ROW.NAME=VALUE for one of them",
    )
    parser.add_argument("--baseline", type=Path, metavar="FOLDER", help="another checkout of flowrl to compare with")
    parser.add_argument("--baseline-set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of its rows")
    parser.add_argument("--only-flowrl", action="store_true", help="leave out bare loops and pipelines")
    parser.add_argument("--eager-only", action="store_true", help="leave out all that is compiled")
    parser.add_argument("--as-given", action="store_true", help="flowrl with --set alone, not as fast as it goes, too")
    return parser.parse_args()


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def say(row: str, what: str, value: float | None, unit: str, note: str = "") -> None:
    """Print a line of the table: it can be cut off after any."""
    figure = "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    print(f"{row:<15} {what:<58} {figure:>9} {unit:<9} {note}".rstrip(), flush=True)


def main() -> None:
    args = arguments()
    import torch
    from gpu_lab import Lab
    from gpu_rows import COMPARED, QUICK, ROWS

    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    if device.type == "cpu" and not args.tiny:
        sys.exit("There is no CUDA device: --tiny tries the script on the CPU.")
    rows = args.rows or (QUICK if args.quick else list(ROWS))
    if unknown := set(rows) - set(ROWS):
        sys.exit(f"There is no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}.")
    torch.manual_seed(0)
    settings = dict(map(setting, args.set))
    if unknown := {row for row, dot, _ in (name.partition(".") for name in settings) if dot} - set(ROWS):
        sys.exit(f"--set names no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}.")
    lab = Lab(device, args.tiny, args.quick, args.only_flowrl, args.eager_only, args.as_given, settings, say)
    figures: Figures = {**about(device), "settings": settings, "tiny": args.tiny, "quick": args.quick, "rows": {}}
    if args.only_flowrl:  # as a baseline
        import flowrl

        figures["flowrl_folder"] = str(Path(flowrl.__file__).resolve().parent)
    write(args.out, figures)
    for name in rows:
        figures["rows"][name] = measured(name, ROWS[name], lab)
        write(args.out, figures)
    failed = failures(figures, rows)
    if args.baseline:
        compared = [name for name in rows if name in COMPARED]
        own = Path(__file__).resolve().parent.parent
        figures["alone"] = alone("new", args, own, args.set, compared)
        figures["baseline"] = alone("old", args, args.baseline.resolve(), args.baseline_set, compared, "--as-given")
        figures["new / old"] = {name: against(name, figures) for name in compared}
        for label, part in (("new", "alone"), ("old", "baseline")):
            failed += [f"{label}: {name}" for name in failures(figures[part], compared)]
        write(args.out, figures)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def failures(figures: Figures, rows: list[str]) -> list[str]:
    """Name the rows that are missing, or that failed as a whole or in a variant."""
    return [name for name in rows if {"error", "failed"} & figures["rows"].get(name, {"error": ""}).keys()]


def measured(name: str, row: Any, lab: Any) -> Figures:
    """Run a row; what it raises is its result."""
    started, lab.row, lab.extra = time.perf_counter(), name, {}
    try:
        figures = row(lab)
    except Exception as error:
        traceback.print_exc()
        lab.failed("", error)
        figures = {"error": f"{type(error).__name__}: {error}"[:2000]}
    lab.free()
    return {**figures, "took_seconds": time.perf_counter() - started}


def about(device: Any) -> Figures:
    """Say what was measured with, and on what."""
    import torch

    import flowrl

    on_gpu = device.type == "cuda"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft", "transformers")}
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if on_gpu else None,
        **versions,
        "cuda": torch.version.cuda,
        "flowrl": flowrl.__version__,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def write(out: Path | None, figures: Figures) -> None:
    if out is not None:
        part = out.with_name(out.name + ".part")
        part.write_text(json.dumps(figures, indent=1, default=str) + "\n")
        part.replace(out)


def alone(
    label: str, args: argparse.Namespace, folder: Path, settings: list[str], rows: list[str], *options: str
) -> Figures:
    """Run rows with the flowrl of a checkout alone, in a process of its own; its lines are printed as they come.

    Of both checkouts: beside bare loops, in the process of these, the same flowrl takes up to a tenth longer.
    """
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "old.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--only-flowrl", "--out", str(out), "--rows", *rows]
        given = ("--tiny", "--quick", "--eager-only", "--as-given")
        command += {*options, *(name for name in given if getattr(args, name.strip("-").replace("-", "_")))}
        command += ["--set", *settings] if settings else []
        child = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(folder)}, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for line in child.stdout:
            print(f"{label}: {line}", end="", flush=True)
        if child.wait() or not out.exists():
            say(label, f"failed: the process ended with {child.returncode}", None, "")
        figures = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    came = Path(figures.pop("flowrl_folder", folder / "flowrl"))
    if folder not in came.parents:
        say(label, f"failed: flowrl came from {came}, not from {folder}", None, "")
        figures["rows"] = {}
    return figures


def against(name: str, figures: Figures) -> Figures:
    """Compare flowrl's speeds in a row with the baseline's; above 1 the newer is faster."""
    old = speeds(figures["baseline"]["rows"].get(name, {})).get("flowrl")
    new = speeds(figures["alone"]["rows"].get(name, {}))
    ratios = {} if old is None else {variant: speed / old for variant, speed in new.items()}
    for variant, ratio in ratios.items():
        say(name, f"speed, {variant} / old", ratio, "")
    return ratios


def speeds(row: Figures) -> dict[str, float]:
    """Read flowrl's speeds from the figures of a row, by variant: what it does in a second."""
    seconds = {name: variant["seconds"] for name, variant in row.get("variants", {}).items()}
    return {name: 1 / value for name, value in {**row.get("seconds", {}), **seconds}.items() if "flowrl" in name}


if __name__ == "__main__":
    main()
