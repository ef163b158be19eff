#!/usr/bin/env bash
# diffusers: the guidance scale of ZImagePipeline is one less than what its documentation says. That calls it w of
# Imagen's equation 2, by which 1 is no guidance, and says that guidance is on above 1. The call has it on above 0, with
# the network evaluated twice, and its scale 1 is w = 2: a scale that leaves guidance out elsewhere guides here, and
# figures of equal scales of this and other pipelines are of other guidance.
#
#     findings/diffusers_guidance_of_z_image.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, transformers 5.23.0, torch 2.13.0: with the scale 1 two samples a step go through the
# network, and one step ends within 1e-5 of w = 2. Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

print({name: version(name) for name in ("diffusers", "transformers", "torch")})
torch.manual_seed(0)
words = ["<pad>", "<unk>", "<start>", "<end>", "user", "white", "circles", "\n"]
model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
model.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=model,
    pad_token="<pad>",
    unk_token="<unk>",
    additional_special_tokens=["<start>", "<end>"],
    chat_template="{% for message in messages %}<start>{{ message['role'] }}\n{{ message['content'] }}<end>{% endfor %}",
)
encoder = Qwen3Config(
    vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8,
)
transformer = ZImageTransformer2DModel(
    in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
    axes_dims=[4, 6, 6], axes_lens=[256, 16, 16],
)
pipe = ZImagePipeline(
    transformer=transformer,
    scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    vae=AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                      up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4),
    text_encoder=Qwen3Model(encoder),
    tokenizer=tokenizer,
)
pipe.set_progress_bar_config(disable=True)
sizes = []
transformer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))


def drawn(prompt: str, scale: float) -> torch.Tensor:
    """Latents after one step from the same noise."""
    return pipe(
        prompt, height=16, width=16, num_inference_steps=1, guidance_scale=scale, output_type="latent",
        generator=torch.manual_seed(1),
    ).images  # fmt: skip


with_prompt, without = drawn("white circles", 0.0), drawn("", 0.0)
sizes.clear()
guided = drawn("white circles", 1.0)
by_equation = {w: float((without + w * (with_prompt - without) - guided).abs().max()) for w in (1.0, 2.0)}
said = "".join(str(pipe.__call__.__doc__).replace("`", "").split())
print(f"samples in the network: {sizes}; distance to Imagen's w: {by_equation}")
sys.exit(not (sizes == [2] and by_equation[2.0] < 1e-5 < 1e-3 < by_equation[1.0] and "guidance_scale>1" in said))
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
