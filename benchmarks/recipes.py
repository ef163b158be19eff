"""Predicted memory of the recipes in docs/recipes.md, as a Markdown table. Reads and downloads no weights.

python benchmarks/recipes.py
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures

import flowrl
from flowrl.training.memory_plan import predict_memory

GIB = 2**30
GROUPS = {"group_size": 2}
FRAMES = 33
"""Of a video."""
RECIPES: list[tuple[str, str, int, dict[str, Any]]] = [
    # GPU, pipeline, resolution, settings beside those recommended for large models
    ("24 GB", "stabilityai/stable-diffusion-3.5-medium", 512, {}),
    ("24 GB", "stabilityai/stable-diffusion-3.5-medium", 1024, {"batch_size": 2, "rollout_batch_size": 4}),
    ("48 GB", "stabilityai/stable-diffusion-3.5-large", 512, {}),
    ("48 GB", "black-forest-labs/FLUX.1-dev", 512, {"batch_size": 4, "guidance_scale": 3.5}),
    ("80 GB", "stabilityai/stable-diffusion-3.5-large", 1024, {}),
    ("80 GB", "black-forest-labs/FLUX.1-dev", 1024, {"batch_size": 4, "guidance_scale": 3.5}),
    ("24 GB", "Efficient-Large-Model/Sana_1600M_1024px_diffusers", 1024, {}),
    ("24 GB", "Tongyi-MAI/Z-Image", 512, {"batch_size": 4}),
    ("48 GB", "Tongyi-MAI/Z-Image", 1024, {"batch_size": 4}),
    ("80 GB", "Qwen/Qwen-Image", 512, {"batch_size": 4}),
    ("141 GB", "black-forest-labs/FLUX.2-dev", 512, {"batch_size": 2, "rollout_batch_size": 4}),
    ("141 GB", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", 256, {"batch_size": 1, "rollout_batch_size": 2, **GROUPS}),
]


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(
        "| GPU | pipeline | pixels | settings | loading | drawing | decoding | training | working copies "
        "| most without them | parameters trained |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for gpu, name, resolution, settings in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            flow = architectures.write(name, Path(folder))
            decode = {"decode_batch": 4 if resolution <= 512 else 1}
            decode |= {"frames": FRAMES} if "Wan" in name else {}
            env = flowrl.make("sd3-compress", flow=flow, resolution=resolution, **decode)
            config = flowrl.ORWCFMW2.configure(recommended=env.recommended, settings=settings)
            config = replace(config, fit_memory=(), working_copies="on")
            plan = predict_memory(flowrl.ORWCFMW2, config, env)
            without = predict_memory(flowrl.ORWCFMW2, replace(config, working_copies="off"), env)
        if plan.missing or without.missing:
            raise SystemExit(f"{name}: {plan.missing or without.missing}")
        shown = ", ".join(f"`{key} {value}`" for key, value in settings.items()) or "as recommended"
        phases = " | ".join(f"{size / GIB:.1f}" for size in plan.phases.values())
        copies = plan.parts["copies to compute with"] / GIB
        least = max(size for phase, size in without.phases.items() if not phase.startswith("loading")) / GIB
        print(
            f"| {gpu} | `{name}` | {resolution} | {shown} | {phases} | {copies:.1f} | {least:.1f} "
            f"| {plan.parts['trained weights'] // 4:,} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
