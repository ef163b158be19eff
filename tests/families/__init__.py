"""Small random pipelines of each declared class, and what their own calls give; `CASES` lists them all."""

from __future__ import annotations


    auraflow,
    case.name: case for module in (sd3, flux, hunyuan_video, hunyuan_video15, ltx, mochi, wan) for case in module.CASES
    chroma,
    cogview4,
    flux,
    flux2,
    hidream,
    hunyuan_video,
    longcat_image,
    ltx,
    lumina2,
    mochi,
    ovis_image,
    qwen_image,
    sana,
    sd3,
    wan,
    z_image,
)
CASES: dict[str, Case] = {
CASES: dict[str, Case] = {case.name: case for module in MODULES for case in module.CASES}
from families import (
from families import flux, hunyuan_video, hunyuan_video15, ltx, mochi, sd3, wan
from families.case import Case
MODULES = (
}
