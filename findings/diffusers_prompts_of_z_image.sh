#!/usr/bin/env bash
# diffusers: ZImagePipeline writes into the list of prompts that it is given. Each prompt is replaced by the text that
# the chat template makes of it, so a second call with the same list puts the template around the template, and the same
# seed gives another picture. Negative prompts that are given as a list go the same way.
#
#     findings/diffusers_prompts_of_z_image.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, transformers 5.23.0, torch 2.13.0: the list is changed, the latents of the second call are
# others by more than 0.01. Fails where that changes.
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
prompts = ["white circles"]
settings = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "latent"}
first = pipe(prompts, generator=torch.manual_seed(1), **settings).images
seen = list(prompts)
second = pipe(prompts, generator=torch.manual_seed(1), **settings).images
again = pipe(["white circles"], generator=torch.manual_seed(1), **settings).images
difference = float((second - first).abs().max())
print(f"after one call: {seen}\nafter two: {prompts}\nlatents of the second call differ by {difference:.2g}")
sys.exit(not (seen != ["white circles"] and difference > 0.01 and torch.equal(first, again)))
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
