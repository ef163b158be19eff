"""Probability of a label under an image classifier."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from flowrl.envs.rewards.catalogue import ModelReward, register_reward
from flowrl.envs.rewards.pretrained import ImagePreprocessing, from_pretrained, load_model
from flowrl.errors import ConfigError, RewardError, did_you_mean
from flowrl.models.imports import importing
from flowrl.types import RewardOutput

MODEL = "google/vit-base-patch16-224"


@register_reward("classifier")
class ClassifierReward(ModelReward):
    """Probability (softmax over its labels) that an image classifier gives to a wanted label.

    Code: transformers, Apache-2.0. Weights: by default google/vit-base-patch16-224 (1,000 classes of ImageNet),
    Apache-2.0.

    Args:
        model: Folder or hub name of a classifier with its image processor.
        label: Name or index of the wanted label; None takes the one that each prompt names, in whole words. A label of
            several names has them separated by commas, as those of ImageNet.
        log: Logarithm of the probability instead.

    Raises:
        ConfigError: The classifier has no such label.
        ModelLoadError: Weights cannot be had, or are incomplete.
    """

    def __init__(self, model: str = MODEL, label: str | None = None, log: bool = False) -> None:
        with importing():
            from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.network = load_model(AutoModelForImageClassification, model, "classifier.model")
        processor = from_pretrained(AutoImageProcessor, model, "classifier.model")
        self.preprocessing = ImagePreprocessing.of_processor(processor, model)
        self.modules = (self.network,)
        self.names: dict[str, set[int]] = {}  # ImageNet has names of two classes, such as "crane"
        for i, label_names in self.network.config.id2label.items():
            for name in (label_names, *label_names.split(",")):
                self.names.setdefault(name.strip().lower(), set()).add(int(i))
        self.wanted = None if label is None else self._index(label, model)
        self.log = log
        kind = "log-probability" if log else "probability"
        wanted = "the label that the prompt names" if label is None else f"label '{label}'"
        self.description = f"{kind} of {wanted} under {model}"
        self._of_prompts: dict[str, int] = {}

    def reward(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1].

        Raises:
            RewardError: A prompt that names no label, or several; only where no label is given.
        """
        indices = [self._named(prompt) if self.wanted is None else self.wanted for prompt in prompts]
        logits = self.network(pixel_values=self.preprocessing(images)).logits
        chosen = torch.tensor(indices, device=logits.device)[:, None]
        log_probability = logits.log_softmax(dim=1).gather(1, chosen)[:, 0]
        return RewardOutput(log_probability if self.log else log_probability.exp())

    def _index(self, label: str, model: str) -> int:
        indices = self.names.get(label.strip().lower(), set())
        if len(indices) == 1:
            return next(iter(indices))
        n = self.network.config.num_labels
        if label.isdigit() and int(label) < n:
            return int(label)
        problem = (
            f"has several labels '{label}': {sorted(indices)}." if indices else f"has no label '{label}' among {n}."
        )
        raise ConfigError(
            f"'{model}' {problem}{did_you_mean(label.lower(), self.names) if not indices else ''} "
            "Give a name or an index as --env.reward-options classifier.label=NAME."
        )

    def _named(self, prompt: str) -> int:
        """Index of the one label that a prompt names; names within longer ones ("fish" in "gold fish") do not count."""
        if prompt not in self._of_prompts:
            text = prompt.lower()
            found = [name for name in self.names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
            longest = [name for name in found if not any(name != other and name in other for other in found)]
            indices = set().union(*(self.names[name] for name in longest))
            if len(indices) != 1:
                said = f"several: {', '.join(longest)}" if indices else "none"
                raise RewardError(
                    f"The reward 'classifier' needs one label of its model in each prompt; '{prompt}' names {said}. "
                    "Give the label as --env.reward-options classifier.label=NAME, or other prompts."
                )
            self._of_prompts[prompt] = indices.pop()
        return self._of_prompts[prompt]
