"""Small random pipelines of each declared class, and what their own calls give; `CASES` lists them all."""

from __future__ import annotations

from families import (
    auraflow,
    chroma,
    cogview4,
    ernie_image,
    flux,
    flux2,
    hidream,
    hunyuan_video,
    hunyuan_video15,
    krea2,
    longcat_image,
    ltx,
    lumina2,
    mochi,
    nucleusmoe_image,
    ovis_image,
    qwen_image,
    sana,
    sd3,
    wan,
    z_image,
)
from families.case import Case

MODULES = (
    auraflow,
    chroma,
    cogview4,
    ernie_image,
    flux,
    flux2,
    hidream,
    hunyuan_video,
    hunyuan_video15,
    krea2,
    longcat_image,
    ltx,
    lumina2,
    mochi,
    nucleusmoe_image,
    ovis_image,
    qwen_image,
    sana,
    sd3,
    wan,
    z_image,
)
CASES: dict[str, Case] = {case.name: case for module in MODULES for case in module.CASES}
