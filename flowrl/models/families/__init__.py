"""Families of pipelines: how each class of diffusers' flow pipelines is a velocity model. One file per family."""

from __future__ import annotations

from flowrl.models.families.auraflow import AuraFlowFlow
from flowrl.models.families.bria import BriaFlow
from flowrl.models.families.cogview4 import CogView4Flow
from flowrl.models.families.flux import FluxFlow
from flowrl.models.families.hidream import HiDreamFlow
from flowrl.models.families.hunyuan_image import HunyuanImageFlow
from flowrl.models.families.kandinsky5_image import Kandinsky5ImageFlow
from flowrl.models.families.lumina2 import Lumina2Flow
from flowrl.models.families.prx import PRXFlow
from flowrl.models.families.registry import DECLARED, NO_FLOWS, declared, register_pipeline
from flowrl.models.families.sana import SanaFlow
from flowrl.models.families.sd3 import SD3Flow

__all__ = ["DECLARED", "NO_FLOWS", "declared", "register_pipeline"]

for family in (
    AuraFlowFlow,
    BriaFlow,
    CogView4Flow,
    FluxFlow,
    HiDreamFlow,
    HunyuanImageFlow,
    Kandinsky5ImageFlow,
    Lumina2Flow,
    PRXFlow,
    SanaFlow,
    SD3Flow,
):
    register_pipeline(family)
