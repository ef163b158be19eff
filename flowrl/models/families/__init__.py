"""Families of pipelines: how each class of diffusers' flow pipelines is a velocity model. One file per family."""

from __future__ import annotations

from flowrl.models.families.chroma import ChromaFlow
from flowrl.models.families.ernie_image import ErnieImageFlow
from flowrl.models.families.flux import FluxFlow
from flowrl.models.families.flux2 import Flux2Flow, Flux2KleinFlow
from flowrl.models.families.krea2 import Krea2Flow
from flowrl.models.families.longcat_image import LongCatImageFlow
from flowrl.models.families.nucleusmoe_image import NucleusMoEImageFlow
from flowrl.models.families.ovis_image import OvisImageFlow
from flowrl.models.families.qwen_image import QwenImageFlow
from flowrl.models.families.registry import DECLARED, NO_FLOWS, declared, register_pipeline
from flowrl.models.families.sd3 import SD3Flow
from flowrl.models.families.z_image import ZImageFlow

__all__ = ["DECLARED", "NO_FLOWS", "declared", "register_pipeline"]

for family in (
    ChromaFlow,
    ErnieImageFlow,
    Flux2Flow,
    Flux2KleinFlow,
    FluxFlow,
    Krea2Flow,
    LongCatImageFlow,
    NucleusMoEImageFlow,
    OvisImageFlow,
    QwenImageFlow,
    SD3Flow,
    ZImageFlow,
):
    register_pipeline(family)
