"""SkyReels V2 that begins with a picture."""

from __future__ import annotations

from flowrl.models.families.skyreels_v2 import SkyReelsV2Flow
from flowrl.models.families.wan_image import WanImageToVideoFlow


class SkyReelsV2ImageToVideoFlow(WanImageToVideoFlow, SkyReelsV2Flow):
    """A `SkyReelsV2ImageToVideoPipeline`: its network is given the picture as that of Wan 2.1 is."""

    PIPELINE = "SkyReelsV2ImageToVideoPipeline"
