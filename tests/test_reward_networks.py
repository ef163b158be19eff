"""Rewards that are networks, on small random checkpoints, against transformers' own processors or plain torch."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import REPOSITORY
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from flowrl.envs.rewards import clip as clip_module
from flowrl.envs.rewards.aesthetic import AestheticHead, AestheticReward
from flowrl.envs.rewards.catalogue import make_reward
from flowrl.envs.rewards.classifier import ClassifierReward
from flowrl.envs.rewards.clip import ClipReward
from flowrl.envs.rewards.hpsv2 import HPSv2Reward
from flowrl.envs.rewards.imagereward import ImageRewardReward
from flowrl.envs.rewards.pickscore import PickScoreReward
from flowrl.envs.rewards.pretrained import ImagePreprocessing
from flowrl.errors import ConfigError, ModelLoadError, RewardError

TOKENIZER = REPOSITORY / "flowrl" / "assets" / "mini-sd3" / "tokenizer"
SIZE, TOKENS, VOCABULARY, END = 24, 12, 150, 1
PROMPTS = ["two red stars", "a blue circle", "two red stars", "four green squares on white"]
ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS, "eos_token_id": END, "bos_token_id": 0}
VISION = {"image_size": SIZE, "patch_size": 8}


def pictures(n: int, height: int, width: int) -> torch.Tensor:
    """Images (n, 3, H, W) in whole 255ths, with coarse and fine structure."""
    coarse = F.interpolate(torch.rand(n, 3, 5, 5), size=(height, width), mode="bilinear")
    return ((0.8 * coarse + 0.2 * torch.rand(n, 3, height, width)) * 255).round() / 255


def as_pillow(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()) for image in images]


def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TOKENIZER)


def randomise(model: nn.Module) -> nn.Module:
    """Weights large enough for scores to differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "bias" in name:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPConfig(
        text_config={**ENCODER, **TEXT},
        vision_config={**ENCODER, **VISION, "num_attention_heads": 4},
        projection_dim=16,
    )
    randomise(transformers.CLIPModel(config)).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    transformers.CLIPProcessor(images, tokenizer()).save_pretrained(folder)
    return folder


def cosines(folder: Path, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """By transformers' own processor and the model's own forward."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=prompts,
        images=as_pillow(images),
        padding="max_length",
        max_length=TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        output = model(**inputs)
    return (output.image_embeds * output.text_embeds).sum(1)


@pytest.mark.parametrize(
    ("height", "width", "tolerance"),
    [(SIZE, SIZE, 1e-5), (64, 64, 0.01), (60, 48, 0.01), (13, 20, 0.01)],
    ids=["as it is", "down", "not square", "up"],
)
def test_clip_is_transformers_own(clip: Path, height: int, width: int, tolerance: float) -> None:
    """Where images are resized, transformers does so on whole numbers from 0 to 255."""
    images = pictures(4, height, width)
    expected = cosines(clip, images, PROMPTS)
    assert expected.std() > 5 * tolerance
    rewards = ClipReward(str(clip))(images, PROMPTS).reward
    torch.testing.assert_close(rewards, expected, atol=tolerance, rtol=0)


def test_siglip_is_transformers_own(tmp_path: Path) -> None:
    config = transformers.SiglipConfig(
        text_config={**ENCODER, **TEXT, "pad_token_id": 1, "projection_size": 32}, vision_config={**ENCODER, **VISION}
    )
    randomise(transformers.SiglipModel(config)).save_pretrained(tmp_path)
    images = transformers.SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    transformers.SiglipProcessor(images, tokenizer()).save_pretrained(tmp_path)
    batch = pictures(4, 40, 56)  # stretched, not cropped
    expected = cosines(tmp_path, batch, PROMPTS)
    torch.testing.assert_close(ClipReward(str(tmp_path))(batch, PROMPTS).reward, expected, atol=0.01, rtol=0)


def test_aesthetic_is_the_head_on_transformers_embedding(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**ENCODER, **VISION, projection_dim=768)
    network = randomise(transformers.CLIPVisionModelWithProjection(config))
    network.save_pretrained(tmp_path)
    head = AestheticHead().eval()
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    images = pictures(3, 60, 48)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    with torch.no_grad():
        embeddings = network(**processor(as_pillow(images), return_tensors="pt")).image_embeds
        expected = head(embeddings / embeddings.norm(dim=1, keepdim=True))
    rewards = AestheticReward(str(tmp_path / "head.safetensors"), str(tmp_path))(images, [""] * 3).reward
    torch.testing.assert_close(rewards, expected, atol=0.1 * float(expected.std()), rtol=0)


def test_every_prompt_is_encoded_once(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward, asked = ClipReward(str(clip)), []
    encode = reward.encoder._encode
    monkeypatch.setattr(reward.encoder, "_encode", lambda p, device: asked.append(p) or encode(p, device))
    images = pictures(4, SIZE, SIZE)
    with torch.no_grad():
        first = reward(images, PROMPTS).reward
        assert torch.equal(reward(images, PROMPTS).reward, first)
    assert asked == ["two red stars", "a blue circle", "four green squares on white"]
    monkeypatch.setattr(clip_module, "KEPT_PROMPTS", 1)
    reward(images[:2], ["a circle", "a star"])  # more than are kept
    assert list(reward.encoder._texts) == ["a star"]
    assert torch.equal(reward(images, PROMPTS).reward, first)


def test_pickscore_is_the_scaled_cosine(clip: Path, tmp_path: Path) -> None:
    shutil.copytree(clip, tmp_path / "model")
    state = load_file(clip / "model.safetensors")
    save_file(
        {**state, "logit_scale": torch.tensor(math.log(50.0))},
        tmp_path / "model" / "model.safetensors",
        {"format": "pt"},
    )
    images = pictures(4, SIZE, SIZE)
    expected = cosines(clip, images, PROMPTS)
    options = {"model": str(tmp_path / "model"), "processor": str(clip)}
    plain, divided = make_reward("pickscore", options), make_reward("pickscore", {**options, "divisor": "26"})
    torch.testing.assert_close(plain(images, PROMPTS).reward, 50 * expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(divided(images, PROMPTS).reward, 50 / 26 * expected, atol=1e-4, rtol=0)
    assert divided.scale == pytest.approx(1 / 26)
    with pytest.raises(ConfigError, match="divisor must be positive"):
        PickScoreReward(str(clip), str(clip), divisor=0)


class Block(nn.Module):
    """A block of open_clip's transformers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 48), "c_proj": nn.Linear(48, width)})

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Blocks(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(32))
        self.positional_embedding = nn.Parameter(torch.randn(1 + (SIZE // 8) ** 2, 32))
        self.proj = nn.Parameter(torch.randn(32, 16))
        self.conv1 = nn.Conv2d(3, 32, 8, stride=8, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(32), nn.LayerNorm(32)
        self.transformer = Blocks(32, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP in plain torch, with the names of open_clip's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.transformer = Visual(), Blocks(32, 2)
        self.token_embedding, self.ln_final = nn.Embedding(VOCABULARY, 32), nn.LayerNorm(32)
        self.positional_embedding = nn.Parameter(torch.randn(TOKENS, 32))
        self.text_projection = nn.Parameter(torch.randn(32, 16))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        mask = torch.full((TOKENS, TOKENS), -math.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask))
        end = (tokens == END).int().argmax(1)
        return F.cosine_similarity(self.visual(pixels), x[torch.arange(len(x)), end] @ self.text_projection)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    return (images - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def tokens_of(prompts: list[str], length: int = TOKENS) -> Any:
    return tokenizer()(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@torch.no_grad()
def test_hpsv2_reads_open_clips_weights(clip: Path, tmp_path: Path, ending: str) -> None:
    network = randomise(OpenClip())
    file = tmp_path / f"weights.{ending}"
    if ending == "pt":
        torch.save({"epoch": 3, "state_dict": network.state_dict()}, file)
    else:
        save_file(network.state_dict(), file)
    images = pictures(4, SIZE, SIZE)
    expected = network(normalised(images), tokens_of(PROMPTS)["input_ids"])
    assert expected.std() > 0.05
    reward = HPSv2Reward(file=str(file), clip=str(clip))
    torch.testing.assert_close(reward(images, PROMPTS).reward, expected, atol=1e-5, rtol=0)


def test_hpsv2_says_what_does_not_fit(clip: Path, tmp_path: Path) -> None:
    file = tmp_path / "odd-weights.safetensors"
    state = OpenClip().state_dict()
    for odd, message in (
        ({"something": torch.zeros(1)}, "'something' is none of them"),
        ({k: v for k, v in state.items() if k != "visual.proj"}, "1 are missing"),
        ({**state, "ln_final.bias": torch.zeros(3)}, r"odd-weights.*do not fit"),
    ):
        save_file(odd, file)
        with pytest.raises(ModelLoadError, match=message):
            HPSv2Reward(file=str(file), clip=str(clip))
    with pytest.raises(ModelLoadError, match="missing-weights"):
        HPSv2Reward(file=str(tmp_path / "missing-weights.pt"), clip=str(clip))
    with pytest.raises(ModelLoadError, match=r"hpsv2\.clip=FOLDER"):
        HPSv2Reward(file=str(file), clip=str(tmp_path / "no-folder"))
    with pytest.raises(ConfigError, match=r"v2\.0 or v2\.1, not 'v3'"):
        HPSv2Reward(version="v3")


@pytest.mark.parametrize("content", [Path("code"), torch.zeros(2), {"a": 3}])
def test_a_checkpoint_that_holds_something_else(clip: Path, tmp_path: Path, content: object) -> None:
    """The first would run code."""
    torch.save(content, tmp_path / "hostile.pt")
    for make in (lambda f: HPSv2Reward(file=f, clip=str(clip)), lambda f: ImageRewardReward(f, str(TOKENIZER))):
        with pytest.raises(ModelLoadError, match=r"hostile\.pt"):
            make(str(tmp_path / "hostile.pt"))


IMAGE_WIDTH, TEXT_WIDTH, PATCH = 128, 192, 8
State = dict[str, torch.Tensor]


def image_reward_state() -> State:
    """Random weights under the names that the authors' network gives them, for 16x16 images."""
    state: State = {}

    def layer(name: str, n_in: int, n_out: int, scale: float = 1.0) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            torch.randn(n_out, n_in) * scale / n_in**0.5,
            torch.randn(n_out),
        )

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(width) + 0.5, torch.randn(width) / 4

    image, text = "blip.visual_encoder", "blip.text_encoder"
    state[f"{image}.cls_token"] = torch.randn(1, 1, IMAGE_WIDTH)
    state[f"{image}.pos_embed"] = torch.randn(1, 5, IMAGE_WIDTH)
    state[f"{image}.patch_embed.proj.weight"] = torch.randn(IMAGE_WIDTH, 3, PATCH, PATCH) / 14
    state[f"{image}.patch_embed.proj.bias"] = torch.randn(IMAGE_WIDTH)
    norm(f"{image}.norm", IMAGE_WIDTH)
    for i in range(2):
        for name in ("norm1", "norm2"):
            norm(f"{image}.blocks.{i}.{name}", IMAGE_WIDTH)
        layer(f"{image}.blocks.{i}.attn.qkv", IMAGE_WIDTH, 3 * IMAGE_WIDTH, 2.0)
        layer(f"{image}.blocks.{i}.attn.proj", IMAGE_WIDTH, IMAGE_WIDTH)
        layer(f"{image}.blocks.{i}.mlp.fc1", IMAGE_WIDTH, 64)
        layer(f"{image}.blocks.{i}.mlp.fc2", 64, IMAGE_WIDTH)
    state[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    state[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(VOCABULARY, TEXT_WIDTH)
    state[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(40, TEXT_WIDTH)
    norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH)
    for i in range(3):
        prefix = f"{text}.encoder.layer.{i}"
        for name, width in (("attention", TEXT_WIDTH), ("crossattention", IMAGE_WIDTH)):
            for key, n_in in (("query", TEXT_WIDTH), ("key", width), ("value", width)):
                layer(f"{prefix}.{name}.self.{key}", n_in, TEXT_WIDTH, 2.0)
            layer(f"{prefix}.{name}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{prefix}.{name}.output.LayerNorm", TEXT_WIDTH)
        layer(f"{prefix}.intermediate.dense", TEXT_WIDTH, 96)
        layer(f"{prefix}.output.dense", 96, TEXT_WIDTH)
        norm(f"{prefix}.output.LayerNorm", TEXT_WIDTH)
    layer("blip.vision_proj", IMAGE_WIDTH, 4)
    layer("blip.text_proj", TEXT_WIDTH, 4)
    for i, (n_in, n_out) in zip((0, 2, 4, 6, 7), ((TEXT_WIDTH, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))):
        layer(f"mlp.layers.{i}", n_in, n_out)
    return state


def image_reward(state: State, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """BLIP with attention from text to image, and the head, in plain torch (Li et al. 2022; Xu et al. 2023)."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (x.unflatten(2, (-1, 64)).transpose(1, 2) for x in (q, k, v))  # heads of 64
        scores = q @ k.transpose(2, 3) / 8
        if seen is not None:
            scores = scores.masked_fill(seen[:, None, None] == 0, -math.inf)
        return (scores.softmax(3) @ v).transpose(1, 2).flatten(2)

    image, text = "blip.visual_encoder", "blip.text_encoder"
    weight, bias = (state[f"{image}.patch_embed.proj.{name}"] for name in ("weight", "bias"))
    x = F.conv2d(pixels, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{image}.cls_token"].expand(len(x), 1, -1), x], 1) + state[f"{image}.pos_embed"]
    for i in range(2):
        block = f"{image}.blocks.{i}"
        x = x + linear(
            f"{block}.attn.proj", attend(*linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, 2))
        )
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    x = norm(f"{image}.norm", x, 1e-6)

    words, places = (state[f"{text}.embeddings.{name}_embeddings.weight"] for name in ("word", "position"))
    h = norm(f"{text}.embeddings.LayerNorm", words[tokens] + places[: tokens.shape[1]], 1e-12)
    for i in range(3):
        prefix = f"{text}.encoder.layer.{i}"
        for name, other, seen in (("attention", None, mask), ("crossattention", x, None)):
            source = h if other is None else other
            q, k, v = (
                linear(f"{prefix}.{name}.self.{key}", y)
                for key, y in (("query", h), ("key", source), ("value", source))
            )
            out = linear(f"{prefix}.{name}.output.dense", attend(q, k, v, seen))
            h = norm(f"{prefix}.{name}.output.LayerNorm", out + h, 1e-12)
        inner = F.gelu(linear(f"{prefix}.intermediate.dense", h))
        h = norm(f"{prefix}.output.LayerNorm", linear(f"{prefix}.output.dense", inner) + h, 1e-12)
    y = h[:, 0]
    for i in (0, 2, 4, 6, 7):
        y = linear(f"mlp.layers.{i}", y)
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_imagereward_is_the_authors_network(tmp_path: Path) -> None:
    state = image_reward_state()
    torch.save(state, tmp_path / "weights.pt")
    images = pictures(4, 16, 16)
    tokens = tokens_of(PROMPTS, 35)
    expected = image_reward(state, normalised(images), tokens["input_ids"], tokens["attention_mask"])
    assert expected.std() > 0.1
    rewards = ImageRewardReward(str(tmp_path / "weights.pt"), str(TOKENIZER))(images, PROMPTS).reward
    torch.testing.assert_close(rewards, expected, atol=1e-4, rtol=1e-4)


def test_imagereward_says_what_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "odd-weights.safetensors"
    state = image_reward_state()
    for odd, message in (
        ({"something": torch.zeros(1)}, "no weights of ImageReward"),
        ({k: v for k, v in state.items() if k != "mlp.layers.7.bias"}, r"1 are missing.*head\.layers\.7\.bias"),
        ({**state, "mlp.extra": torch.zeros(1)}, r"1 left over.*head\.extra"),
    ):
        save_file(odd, file)
        with pytest.raises(ModelLoadError, match=message):
            ImageRewardReward(str(file), str(TOKENIZER))
    with pytest.raises(ModelLoadError, match=r"imagereward\.tokenizer=FOLDER"):
        ImageRewardReward(str(file), str(tmp_path / "no-folder"))


LABELS = {0: "tench, Tinca tinca", 1: "goldfish", 2: "fish", 3: "crane", 4: "crane"}


def save_classifier(folder: Path, processor: Any = None) -> Path:
    config = transformers.ViTConfig(**ENCODER, **VISION, id2label=LABELS, label2id={v: k for k, v in LABELS.items()})
    randomise(transformers.ViTForImageClassification(config)).save_pretrained(folder)
    processor = processor or transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["vit", "bit", "convnext"])
def test_classifier_is_transformers_own(tmp_path: Path, kind: str) -> None:
    """With processors that stretch (bilinear), cut the middle out (bicubic), and scale by a share."""
    square = {"height": SIZE, "width": SIZE}
    processor = {
        "vit": lambda: transformers.ViTImageProcessor(size=square),
        "bit": lambda: transformers.BitImageProcessor(size={"shortest_edge": 27}, crop_size=square),
        "convnext": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": SIZE}, crop_pct=0.875),
    }[kind]()
    folder = save_classifier(tmp_path, processor)
    images = pictures(4, 60, 48)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    inputs = transformers.AutoImageProcessor.from_pretrained(folder)(as_pillow(images), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(1)
    for label, index in (("goldfish", 1), ("Tinca tinca", 0), ("4", 4)):
        reward = ClassifierReward(str(folder), label)(images, [""] * 4).reward
        torch.testing.assert_close(reward, expected[:, index], atol=0.02, rtol=0)
    logs = ClassifierReward(str(folder), "goldfish", log=True)(images, [""] * 4).reward
    torch.testing.assert_close(logs.exp(), ClassifierReward(str(folder), "goldfish")(images, [""] * 4).reward)
    prompts = ["a Fish", "fish or goldfish", "one tench", "fish"]  # "fish" is within the longer name
    named = ClassifierReward(str(folder))(images, prompts)
    torch.testing.assert_close(named.reward, expected[torch.arange(4), torch.tensor([2, 1, 0, 2])], atol=0.02, rtol=0)


def test_classifier_says_which_label_is_meant(tmp_path: Path) -> None:
    folder = str(save_classifier(tmp_path))
    with pytest.raises(ConfigError, match=r"no label 'golfish' among 5. Did you mean 'goldfish'"):
        ClassifierReward(folder, "golfish")
    with pytest.raises(ConfigError, match=r"several labels 'crane': \[3, 4\]"):
        ClassifierReward(folder, "crane")
    with pytest.raises(ConfigError, match="no label '5'"):
        ClassifierReward(folder, "5")
    reward, image = ClassifierReward(folder), pictures(1, SIZE, SIZE)
    for prompt, message in (
        ("a crane", "several: crane"),
        ("a selfish dog", "names none"),
        ("a fish beside a tench", "several: tench, fish"),
    ):
        with pytest.raises(RewardError, match=message):
            reward(image, [prompt])


def test_a_classifier_without_its_last_layer(tmp_path: Path) -> None:
    """transformers would draw the missing weights at random, and the reward would be made up."""
    folder = save_classifier(tmp_path)
    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"2 weights are missing, the first 'classifier.bias'"):
        ClassifierReward(str(folder), "fish")


@pytest.mark.parametrize("name", ["clip", "pickscore", "classifier"])
def test_a_folder_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=rf"no-folder.*{name}\.model=FOLDER"):
        make_reward(name, {"model": str(tmp_path / "no-folder")})


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(**ENCODER, **VISION)).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="does not embed both texts and images"):
        ClipReward(str(tmp_path))


def test_a_processor_that_does_something_else() -> None:
    square = {"height": SIZE, "width": SIZE}
    flipped = transformers.MobileViTImageProcessor(size={"shortest_edge": SIZE}, crop_size=square)
    with pytest.raises(ModelLoadError):  # it swaps red and blue
        ImagePreprocessing.of_processor(flipped, "mobilevit")
    nearest = transformers.ViTImageProcessor(size=square, resample=0)
    with pytest.raises(ModelLoadError, match="resizes in a way"):
        ImagePreprocessing.of_processor(nearest, "nearest")


def test_images_that_are_not_square_are_filled_up() -> None:
    images = pictures(1, 40, 60)
    small = np.asarray(as_pillow(images)[0].resize((24, 16), Image.Resampling.BICUBIC))
    expected = np.zeros((24, 24, 3))
    expected[4:20] = small / 255
    got = ImagePreprocessing(24, pad=True, mean=(0, 0, 0), std=(1, 1, 1))(images)[0].permute(1, 2, 0)
    np.testing.assert_allclose(got.numpy(), expected, atol=1.5 / 255)


def test_prompts_that_a_reward_cuts_are_warned_of_once(clip: Path) -> None:
    reward = make_reward("clip", {"model": str(clip)})
    images, long = pictures(3, 32, 32), "three red stars on blue " * 40
    with pytest.warns(
        UserWarning, match=r"1 of 2 prompts are longer than the reward's text encoder can take.*it takes"
    ):
        reward(images, ["a star", long, long])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*prompts are longer")
        reward(images, ["a star", long + "again", long])
