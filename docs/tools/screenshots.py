"""Pictures of report pages for docs/report.md, by Chromium; some minutes on one core.

    python docs/tools/screenshots.py

Trains two short runs, unless they are in the folder given by --runs already.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from flowrl.pages.run_page import write_report
from flowrl.run import main as run

IMAGES = Path(__file__).resolve().parents[1] / "images"
RUNS = {
    "gaussians": ["--algo", "orw_w2", "--env", "gaussians-linear"],
    "mountaincar": [
        "--algo", "orw_w2", "--env", "plan-mountaincar", "--algo.tau", "4", "--algo.alpha", "0.1",
        "--algo.learning-rate", "5e-4", "--algo.n-epochs", "4", "--total-timesteps", "20480",
    ],
}  # fmt: skip
PICTURES = {
    "report-light": ("gaussians", False, 1000, 2080),
    "report-dark": ("mountaincar", True, 860, 1800),
    "report-phone": ("gaussians", False, 390, 1800),
}
"""Which run, whether dark, width and height."""
NARROWEST = 500
"""Chromium's windows are not narrower; what is goes into a frame of that width."""
DARK = "@media (prefers-color-scheme: dark)"


def picture(report: Path, dark: bool, width: int, height: int, out: Path) -> None:
    chromium = next(
        found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))
    )
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        text = report.read_text(encoding="utf-8")
        page.write_text(text.replace(DARK, "@media all") if dark else text, encoding="utf-8")
        if width < NARROWEST:
            frame = Path(folder, "frame.html")
            size = f'width="{width}" height="{height}"'
            frame.write_text(f'<body style="margin:0"><iframe src="page.html" {size} style="border:0"></iframe>')
            page = frame
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={max(width, NARROWEST)},{height}"]
        command += ["--virtual-time-budget=3000", f"--screenshot={shot}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        image = Image.open(shot).convert("RGB").crop((0, 0, width, height))
    image.quantize(16, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are, or go")
    folder = parser.parse_args().runs
    for name, arguments in RUNS.items():
        if not (folder / name / "report.html").exists():
            run([*arguments, "--out", str(folder), "--name", name])
        write_report(folder / name)
    for name, (of, dark, width, height) in PICTURES.items():
        out = IMAGES / f"{name}.png"
        picture(folder / of / "report.html", dark, width, height, out)
        print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
