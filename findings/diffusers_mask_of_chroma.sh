#!/usr/bin/env bash
# diffusers: Chroma "requires that all except the first padding token are masked out" (a comment of its pipeline), and
# they are not:
# - ChromaPipeline makes the mask of floats, 1 for tokens and 0 for padding. Attention adds such a mask to its logits, so
#   padding counts exp(-1) as much as a token. A mask of booleans would keep it out.
# - With gradient checkpointing, ChromaTransformer2DModel gives its single blocks no mask at all: the network in training
#   is another one than in sampling.
#
#     findings/diffusers_mask_of_chroma.sh     # installs into a temporary folder
#
# Seen with diffusers 0.42.1, torch 2.13.0: other embeddings of padding change the output by more than 0.01 under the
# pipeline's mask and not at all under one of booleans; checkpointing changes it by more than 0.005 under both. Fails
# where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat >"$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

print({name: version(name) for name in ("diffusers", "transformers", "torch")})
torch.manual_seed(0)
network = ChromaTransformer2DModel(
    in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=32,
    approximator_layers=1,
)
model = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "white": 2, "circles": 3}, unk_token="<unk>"))
model.pre_tokenizer = pre_tokenizers.Whitespace()
pipe = ChromaPipeline(
    transformer=network,
    scheduler=FlowMatchEulerDiscreteScheduler(),
    vae=None,
    text_encoder=T5EncoderModel(T5Config(vocab_size=4, d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2)),
    tokenizer=PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>"),
)
with torch.no_grad():
    embeds, text_ids, mask, *_ = pipe.encode_prompt(
        ["white circles"], do_classifier_free_guidance=False, max_sequence_length=8
    )
print(f"mask of the pipeline: {mask}")
image = torch.randn(1, 16, 16)
positions = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
padding = embeds.clone()
padding[:, 3:] = 3 * torch.randn_like(padding[:, 3:])  # behind the two words and the first padding token


def output(embeds, mask):
    mask = torch.cat([mask, mask.new_ones(1, 16)], dim=1)
    return network(
        image, embeds, torch.tensor([0.5]), positions, text_ids, attention_mask=mask, return_dict=False
    )[0].detach()


def changes(mask):
    plain = output(embeds, mask)
    by_padding = float((output(padding, mask) - plain).abs().max())
    network.enable_gradient_checkpointing()
    by_checkpointing = float((output(embeds, mask) - plain).abs().max())
    network.disable_gradient_checkpointing()
    return by_padding, by_checkpointing


of_floats, of_booleans = changes(mask), changes(mask.bool())
for name, (by_padding, by_checkpointing) in (("floats", of_floats), ("booleans", of_booleans)):
    print(f"mask of {name}: padding changes the output by {by_padding:.2g}, checkpointing by {by_checkpointing:.2g}")
as_stated = mask.is_floating_point() and of_floats[0] > 0.01 and of_booleans[0] == 0
sys.exit(not (as_stated and min(of_floats[1], of_booleans[1]) > 0.005))
PYTHON
"$work/venv/bin/python" "$work/look.py" || { echo "diffusers does otherwise than stated" >&2; exit 1; }
