"""Small random pipelines of each declared class, and what their own calls give; `CASES` lists them all."""

from __future__ import annotations

from families import (
    chroma,
    ernie_image,
    flux,
    flux2,
    krea2,
    longcat_image,
    nucleusmoe_image,
    ovis_image,
    qwen_image,
    sd3,
    z_image,
)
from families.case import Case

MODULES = (
    chroma,
    ernie_image,
    flux,
    flux2,
    krea2,
    longcat_image,
    nucleusmoe_image,
    ovis_image,
    qwen_image,
    sd3,
    z_image,
)
CASES: dict[str, Case] = {case.name: case for module in MODULES for case in module.CASES}
