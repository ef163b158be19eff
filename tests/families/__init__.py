"""Small random pipelines of each declared class, and what their own calls give; `CASES` lists them all."""

from __future__ import annotations

from families import (
    auraflow,
    bria,
    cogview4,
    flux,
    hidream,
    hunyuan_image,
    kandinsky5_image,
    lumina2,
    prx,
    sana,
    sd3,
)
from families.case import Case

MODULES = (
    auraflow,
    bria,
    cogview4,
    flux,
    hidream,
    hunyuan_image,
    kandinsky5_image,
    lumina2,
    prx,
    sana,
    sd3,
)
CASES: dict[str, Case] = {case.name: case for module in MODULES for case in module.CASES}
