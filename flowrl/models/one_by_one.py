"""Pipelines whose network takes what pads a prompt for text, and has no mask."""

from __future__ import annotations

from typing import Any

import torch

from flowrl.models.pipeline import PipelineFlow


class OneByOneFlow(PipelineFlow):
    """A flow that is called sample by sample, each prompt at its own length, as in a call of its own.

    `inputs` gives the numbers of tokens (B,) as `lengths` besides. In a call of several prompts, the pipeline shows the
    network what pads all to the longest.
    """

    OWN_CALL = "Its own call draws noise in another order, so that a seed gives another sample."

    def predict(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Call the network, once a sample."""
        predicted = []
        for row, length in enumerate(inputs.pop("lengths").tolist()):
            own = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            own["encoder_hidden_states"] = own["encoder_hidden_states"][:, :length]
            predicted.append(self.predict_one(own))
        return torch.cat(predicted)

    def predict_one(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Call the network for one sample."""
        return super().predict(inputs)
