"""Small random pipelines of each declared class, and what their own calls give; `CASES` lists them all."""

from __future__ import annotations

from families import flux, hunyuan_video, hunyuan_video15, ltx, mochi, sd3, wan
from families.case import Case

CASES: dict[str, Case] = {
    case.name: case for module in (sd3, flux, hunyuan_video, hunyuan_video15, ltx, mochi, wan) for case in module.CASES
}
