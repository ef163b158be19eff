"""Families of pipelines: how each class of diffusers' flow pipelines is a velocity model. One file per family."""

from __future__ import annotations

from flowrl.models.families.ace_step import AceStepFlow
from flowrl.models.families.auraflow import AuraFlowFlow
from flowrl.models.families.bria import BriaFlow
from flowrl.models.families.chroma import ChromaFlow
from flowrl.models.families.cogview4 import CogView4Flow
from flowrl.models.families.ernie_image import ErnieImageFlow
from flowrl.models.families.flux import FluxFlow
from flowrl.models.families.flux2 import Flux2Flow, Flux2KleinFlow
from flowrl.models.families.flux_kontext import FluxKontextFlow
from flowrl.models.families.glm_image import GlmImageFlow
from flowrl.models.families.hidream import HiDreamFlow
from flowrl.models.families.hunyuan_image import HunyuanImageFlow
from flowrl.models.families.hunyuan_video import HunyuanVideoFlow
from flowrl.models.families.hunyuan_video15 import HunyuanVideo15Flow
from flowrl.models.families.hunyuan_video15_image import HunyuanVideo15ImageToVideoFlow
from flowrl.models.families.kandinsky5_image import Kandinsky5ImageFlow
from flowrl.models.families.kandinsky5_image_to_video import Kandinsky5ImageToVideoFlow
from flowrl.models.families.kandinsky5_video import Kandinsky5VideoFlow
from flowrl.models.families.krea2 import Krea2Flow
from flowrl.models.families.longcat_image import LongCatImageFlow
from flowrl.models.families.longcat_image_edit import LongCatImageEditFlow
from flowrl.models.families.ltx import LTXFlow
from flowrl.models.families.ltx_image import LTXImageToVideoFlow
from flowrl.models.families.lumina2 import Lumina2Flow
from flowrl.models.families.mochi import MochiFlow
from flowrl.models.families.nucleusmoe_image import NucleusMoEImageFlow
from flowrl.models.families.ovis_image import OvisImageFlow
from flowrl.models.families.prx import PRXFlow
from flowrl.models.families.qwen_image import QwenImageFlow
from flowrl.models.families.qwen_image21 import QwenImage21Flow
from flowrl.models.families.qwen_image_edit import QwenImageEditFlow, QwenImageEditPlusFlow
from flowrl.models.families.registry import DECLARED, NO_FLOWS, declared, register_pipeline
from flowrl.models.families.sana import SanaFlow
from flowrl.models.families.sana_image_to_video import SanaImageToVideoFlow
from flowrl.models.families.sana_video import SanaVideoFlow
from flowrl.models.families.sd3 import SD3Flow
from flowrl.models.families.skyreels_v2 import SkyReelsV2Flow
from flowrl.models.families.skyreels_v2_image import SkyReelsV2ImageToVideoFlow
from flowrl.models.families.stable_audio3 import StableAudio3Flow
from flowrl.models.families.wan import WanFlow
from flowrl.models.families.wan_image import WanImageToVideoFlow
from flowrl.models.families.z_image import ZImageFlow

__all__ = ["DECLARED", "NO_FLOWS", "declared", "register_pipeline"]

for family in (
    AceStepFlow,
    AuraFlowFlow,
    BriaFlow,
    ChromaFlow,
    CogView4Flow,
    ErnieImageFlow,
    Flux2Flow,
    Flux2KleinFlow,
    FluxFlow,
    FluxKontextFlow,
    GlmImageFlow,
    HiDreamFlow,
    HunyuanImageFlow,
    HunyuanVideo15Flow,
    HunyuanVideo15ImageToVideoFlow,
    HunyuanVideoFlow,
    Kandinsky5ImageFlow,
    Kandinsky5ImageToVideoFlow,
    Kandinsky5VideoFlow,
    Krea2Flow,
    LongCatImageEditFlow,
    LongCatImageFlow,
    LTXFlow,
    LTXImageToVideoFlow,
    Lumina2Flow,
    MochiFlow,
    NucleusMoEImageFlow,
    OvisImageFlow,
    PRXFlow,
    QwenImage21Flow,
    QwenImageEditFlow,
    QwenImageEditPlusFlow,
    QwenImageFlow,
    SanaFlow,
    SanaImageToVideoFlow,
    SanaVideoFlow,
    SD3Flow,
    SkyReelsV2Flow,
    SkyReelsV2ImageToVideoFlow,
    StableAudio3Flow,
    WanFlow,
    WanImageToVideoFlow,
    ZImageFlow,
):
    register_pipeline(family)
