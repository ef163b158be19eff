"""mini-sd3's parts and how they are put together: everything in diffusers' own classes and folder format."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from flowrl.envs.shapes import WORDS
from flowrl.models.tokenizer_files import split_tokenizers

CONTEXT_LENGTH = 8  # tokens of a prompt, with start and end
TEXT_WIDTH = 96  # of each of the two text encoders
SAMPLING = {"num_inference_steps": 20, "guidance_scale": 1.0, "max_sequence_length": 1}
SPARE_WORDS = ("orange", "purple", "grey")  # tokens of no use yet
CARD = Path(__file__).with_name("MODEL_CARD.md")
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(
    words: tuple[str, ...] = (*WORDS, *SPARE_WORDS), symbols: str = "", length: int = CONTEXT_LENGTH
) -> CLIPTokenizer:
    """Every word of the little world is one token; other words fall into letters."""
    alphabet = string.ascii_lowercase + string.digits + symbols
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        special_tokens=[START, END],
        initial_alphabet=list(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([*words, *alphabet], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=length)


def build_text_encoder(
    tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH, heads: int = 3
) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    nn.init.normal_(encoder.get_input_embeddings().weight, std=0.5)  # CLIP's own 0.02 learns slowly at this size
    return encoder


def build_transformer(
    width: int = 144, layers: int = 6, heads: int = 3, size: int = 8, channels: int = 16, text_width: int = TEXT_WIDTH
) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=size,
        qk_norm="rms_norm",
    )


def build_placeholder_t5(text_width: int = TEXT_WIDTH) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 without layers that returns zeros: just what the pipeline uses itself where there is no T5.

    With it the folder loads by a plain ``from_pretrained(folder)``, which insists on every component.
    """
    config = T5Config(vocab_size=2, d_model=2 * text_width, d_kv=8, d_ff=8, num_layers=0, num_heads=1)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    words.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")  # every text becomes the end token alone
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return encoder, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def build_pipeline(autoencoder: AutoencoderTiny, shift: float) -> StableDiffusion3Pipeline:
    """An untrained pipeline around ``autoencoder``, with sampling times shifted towards noise."""
    tokenizer = build_tokenizer()
    encoders = build_text_encoder(tokenizer), build_text_encoder(tokenizer)
    return assemble(autoencoder, build_transformer(), tokenizer, encoders, shift)


def assemble(
    autoencoder: AutoencoderTiny,
    transformer: SD3Transformer2DModel,
    tokenizer: CLIPTokenizer,
    encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
    shift: float,
) -> StableDiffusion3Pipeline:
    """A pipeline of these parts."""
    t5, t5_tokenizer = build_placeholder_t5(encoders[0].config.projection_dim)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=autoencoder,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def edit_config(folder: Path, **changes: str | None) -> None:
    """Changes fields of a component's config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    config = {name: value for name, value in config.items() if name not in changes or value is not None}
    path.write_text(json.dumps(config, indent=2) + "\n")


def save_pipeline(pipe: StableDiffusion3Pipeline, folder: Path, card: Path = CARD) -> None:
    """Writes ``pipe`` in float16, together with its model card; the folder is replaced as a whole."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    half = copy.deepcopy(pipe).to(torch.float16)
    half.save_pretrained(new, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        edit_config(new / name, dtype="float32")  # else a plain from_pretrained mixes float16 and float32
    edit_config(new / "vae", block_out_channels=None)  # derived; AutoencoderTiny warns when it finds it
    for path in new.rglob("*.json"):  # folders of this machine, and a name that only transformers 5 has
        text = re.sub(r'\n *"_name_or_path": "[^"]*",?', "", path.read_text())
        path.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    split_tokenizers(new)
    (new / "sampling.json").write_text(json.dumps(SAMPLING, indent=2) + "\n")
    shutil.copy(card, new / "README.md")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


class RepeatedTokenAttention:
    """SD3's joint attention, where the last context token stands for ``exp(log_repeats)`` equal ones.

    In place of T5's embeddings the pipeline appends ``max_sequence_length`` zero tokens to the context. They
    have no position, so all of them stay equal through every layer: one of them whose attention logit is
    raised by the logarithm of their number is exactly as good, and far cheaper. Training draws that number
    at random, so the finished model can be sampled with any.
    """

    log_repeats: Tensor  # (B,), minus infinity for none; set before each forward pass

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object
    ) -> tuple[Tensor, Tensor]:
        n_image = hidden_states.shape[1]

        def heads(x: Tensor, norm: nn.Module | None = None) -> Tensor:
            x = x.unflatten(2, (attn.heads, -1)).transpose(1, 2)  # (B, heads, tokens, head width)
            return x if norm is None else norm(x)

        query = [heads(attn.to_q(hidden_states), attn.norm_q)]
        query.append(heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q))
        key = [heads(attn.to_k(hidden_states), attn.norm_k)]
        key.append(heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k))
        value = [heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))]
        q, k, v = (torch.cat(parts, dim=2) for parts in (query, key, value))
        bias = nn.functional.pad(self.log_repeats.view(-1, 1, 1, 1), (k.shape[2] - 1, 0))
        # written out: on a CPU the fused kernel's backward pass takes a third of the whole training step
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + bias.to(q.dtype)
        out = logits.softmax(dim=-1).to(v.dtype) @ v
        image, context = out.transpose(1, 2).flatten(2).split([n_image, encoder_hidden_states.shape[1]], dim=1)
        if not attn.context_pre_only:
            context = attn.to_add_out(context)
        return attn.to_out[0](image), context

    def draw_repeats(self, n: int, largest: int = 256) -> None:
        """No zero token for half of the samples, else a log-uniform number up to ``largest``."""
        self.log_repeats = torch.rand(n) * math.log(largest)
        self.log_repeats[torch.rand(n) < 0.5] = -1e4
