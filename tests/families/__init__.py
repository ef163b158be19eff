"""Small random pipelines of each declared class, and what their own calls give; `CASES` lists them all."""

from __future__ import annotations

from families import (
    auraflow,
    bria,
    chroma,
    cogview4,
    flux,
    flux2,
    hidream,
    hunyuan_image,
    hunyuan_video,
    kandinsky5_image,
    longcat_image,
    ltx,
    lumina2,
    mochi,
    ovis_image,
    prx,
    qwen_image,
    sana,
    sd3,
    wan,
    z_image,
)
from families.case import Case

MODULES = (
    auraflow,
    bria,
    chroma,
    cogview4,
    flux,
    flux2,
    hidream,
    hunyuan_image,
    hunyuan_video,
    kandinsky5_image,
    longcat_image,
    ltx,
    lumina2,
    mochi,
    ovis_image,
    prx,
    qwen_image,
    sana,
    sd3,
    wan,
    z_image,
)
CASES: dict[str, Case] = {case.name: case for module in MODULES for case in module.CASES}
