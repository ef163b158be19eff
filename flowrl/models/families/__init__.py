"""Families of pipelines: how each class of diffusers' flow pipelines is a velocity model. One file per family."""

from __future__ import annotations

from flowrl.models.families.flux import FluxFlow
from flowrl.models.families.hunyuan_video import HunyuanVideoFlow
from flowrl.models.families.hunyuan_video15 import HunyuanVideo15Flow
from flowrl.models.families.ltx import LTXFlow
from flowrl.models.families.mochi import MochiFlow
from flowrl.models.families.registry import DECLARED, NO_FLOWS, declared, register_pipeline
from flowrl.models.families.sd3 import SD3Flow
from flowrl.models.families.wan import WanFlow

__all__ = ["DECLARED", "NO_FLOWS", "declared", "register_pipeline"]

for family in (SD3Flow, FluxFlow, HunyuanVideoFlow, HunyuanVideo15Flow, LTXFlow, MochiFlow, WanFlow):
    register_pipeline(family)
