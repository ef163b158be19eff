"""Build the pictures that `emoji-compress` is about: Google's Noto emoji at 32x32, over white, on one sheet.

    npm pack emoji-datasource-google@16.0.0          # 74 MB, unpacks into package/
    python pretrain/emoji/build.py package

Writes `emoji.png`, a sheet of 41 pictures in a row, and `emoji.json`: name, group and code points of each, in the order
of the sheet. Left out are flags, components (skin tones) and variants in skin tone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from flowrl.envs.emoji import COLUMNS, FOLDER, SIZE

LEFT_OUT = ("Flags", "Component")
BACKGROUND = "white"


def picture(path: Path) -> np.ndarray:
    """A picture over the background, (SIZE, SIZE, 3): mean over squares of pixels."""
    drawn = Image.open(path).convert("RGBA")
    canvas = Image.new("RGBA", drawn.size, BACKGROUND)
    canvas.alpha_composite(drawn)
    return np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="folder of the unpacked package")
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    entries = json.loads((args.package / "emoji.json").read_text(encoding="utf-8"))
    kept = [e for e in entries if e["category"] not in LEFT_OUT and e["has_img_google"]]
    kept.sort(key=lambda e: e["sort_order"])
    pictures = [picture(args.package / "img" / "google" / "64" / e["image"]) for e in kept]
    rows = -(-len(pictures) // COLUMNS)
    sheet = np.full((rows * SIZE, COLUMNS * SIZE, 3), 255, dtype=np.uint8)
    for i, pixels in enumerate(pictures):
        top, left = i // COLUMNS * SIZE, i % COLUMNS * SIZE
        sheet[top : top + SIZE, left : left + SIZE] = pixels
    args.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(args.out / "emoji.png", optimize=True)
    lines = [json.dumps([e["name"].lower(), e["category"], e["unified"]]) for e in kept]
    (args.out / "emoji.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{len(kept)} pictures, {(args.out / 'emoji.png').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
