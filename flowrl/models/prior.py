"""Any generator `G(z)` as a flow: of its latents, whose distribution is a standard normal."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from flowrl.checks import is_whole, told_apart
from flowrl.errors import ConfigError
from flowrl.models.base import VelocityModel
from flowrl.models.mlp import MLP
from flowrl.models.source import FlowSource
from flowrl.types import Condition, Contexts

LARGEST_LATENT = 2**20
Encoder = Callable[[Contexts], torch.Tensor]
"""What describes contexts to a network: B contexts -> numbers (B, n)."""


def prior_velocity(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Compute the velocity (B, ...) of the flow from N(0, I) to N(0, I), at `x_t` (B, ...) and `t` (B,).

    `x_t = (1 - t) x_0 + t x_1` of independent standard normals has variance `s^2 = (1 - t)^2 + t^2` and covariance
    `2t - 1` with `x_1 - x_0`, so that `E[x_1 - x_0 | x_t] = (2t - 1) / s^2 x_t`. As `2t - 1 = s s'`, the ODE takes
    `x_0` to `s x_0` at time t, and back to `x_0` itself at 1.
    """
    t = t.view(-1, *[1] * (x_t.dim() - 1))
    return (2 * t - 1) / ((1 - t).square() + t.square()) * x_t


class PriorFlow(VelocityModel):
    """A generator `G(z)`, z standard normal, as a flow of z: the exact field plus a correction that starts at zero.

    The reference draws z ~ N(0, I), so its samples are those of G; fine-tuning changes how z is drawn, never G. G is
    put into evaluation mode, and its weights ask for no gradients; those of a reward flow through it to z.

    Args:
        decoder: G, `z (B, *dim) -> samples (B, ...)`.
        dim: Dimension of z, or its shape, e.g. (100, 1, 1).
        sample_shape: Shape of one sample; found by a call of G when not given.
        contexts: Contexts to condition on; none for an unconditional flow.
        encode: What describes them to the network, `B contexts -> (B, n)`; one-hot vectors when not given.
        width: Width of the correction's hidden layers.
        depth: Number of its hidden layers.
        decode_batch: Samples that G makes at once.

    Raises:
        ConfigError: Sizes without meaning, or a G that is no module or gives no batch of samples; says which.
    """

    def __init__(
        self,
        decoder: nn.Module,
        dim: int | tuple[int, ...],
        *,
        sample_shape: tuple[int, ...] | None = None,
        contexts: Contexts = (),
        encode: Encoder | None = None,
        width: int = 256,
        depth: int = 3,
        decode_batch: int = 256,
    ) -> None:
        super().__init__()
        self.latent_shape = latent_shape_of(dim)
        if not is_whole(decode_batch, 1, 2**31):
            raise ConfigError(f"decode_batch must be a positive whole number, not {decode_batch!r}.")
        self.decode_batch = decode_batch
        checked_module(decoder).eval().requires_grad_(False)
        self._decoder = (decoder,)  # in a tuple: no submodule
        self.sample_shape = tuple(sample_shape or probed(decoder, self.latent_shape).shape[1:])
        self._index = {told_apart(context): i for i, context in enumerate(contexts)}
        self._encoder = encode
        first = self.encode(list(contexts[:1])) if contexts else ()
        n_features = sum(part.shape[1] for part in first)
        self.network = MLP(math.prod(self.latent_shape), width, depth, zero_init=True, n_features=n_features)

    @property
    def decoder(self) -> nn.Module:
        """The generator."""
        return self._decoder[0]

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Add the correction to the exact velocity."""
        return prior_velocity(x_t, t) + self.network(x_t.flatten(1), t, *cond).view_as(x_t)

    def encode(self, contexts: Contexts) -> Condition:
        """Encode contexts as rows (n, features); an unconditional flow has an empty condition.

        Raises:
            ConfigError: A context that the flow was not made for, or an encoder that gives no rows.
        """
        if not self._index:
            return ()
        if self._encoder is None:
            unknown = [context for context in contexts if told_apart(context) not in self._index]
            if unknown:
                raise ConfigError(
                    f"The flow was made for {len(self._index)} contexts and {unknown[0]!r} is none of them: give "
                    "encode=, a function of contexts that gives a row of numbers for each, to have others."
                )
            index = torch.tensor([self._index[told_apart(context)] for context in contexts])
            return (nn.functional.one_hot(index, len(self._index)).float(),)
        rows = self._encoder(contexts)
        if not isinstance(rows, torch.Tensor) or rows.dim() != 2 or len(rows) != len(contexts):
            raise ConfigError(
                f"encode must give a tensor of shape ({len(contexts)}, n) for {len(contexts)} contexts, a row for "
                f"each; it gave {_described(rows)}."
            )
        return (rows.detach().float(),)

    def decode(self, x_1: torch.Tensor) -> torch.Tensor:
        """Generate samples (B, *sample_shape), float32, from latents (B, *latent_shape), `decode_batch` at once."""
        held = next(itertools.chain(self.decoder.parameters(), self.decoder.buffers()), None)
        if held is not None and held.device != x_1.device:
            self.decoder.to(x_1.device)
        z = x_1.to(held.dtype) if held is not None and held.is_floating_point() else x_1
        return torch.cat([self.decoder(part) for part in z.split(self.decode_batch)]).float()

    def move_frozen(self, device: torch.device) -> None:
        """Move the generator to `device`."""
        super().move_frozen(device)
        self.decoder.to(device)

    def offload(self) -> None:
        """Move the generator to the host; `decode` gets it back."""
        self.decoder.to("cpu")


def latent_shape_of(dim: Any) -> tuple[int, ...]:
    """Give the shape of z for its dimension, or for the shape itself.

    Raises:
        ConfigError: It is neither.
    """
    shape = tuple(dim) if isinstance(dim, tuple | list) else (dim,)
    if not shape or not all(is_whole(n, 1, LARGEST_LATENT) for n in shape) or math.prod(shape) > LARGEST_LATENT:
        raise ConfigError(
            f"The latents of a generator have a dimension, a whole number from 1 to {LARGEST_LATENT} such as 100, or a "
            f"shape such as (100, 1, 1); not {dim!r}."
        )
    return shape


def checked_module(generator: Any, made: bool = False) -> nn.Module:
    """Check that a generator is a module.

    Args:
        generator: The generator.
        made: A function has returned it.

    Raises:
        ConfigError: It is not; says how to make one of it.
    """
    if not isinstance(generator, nn.Module):
        came = f"the function given returned {_described(generator)}" if made else f"not {_described(generator)}"
        raise ConfigError(
            f"A generator is a torch.nn.Module that maps z to samples, or a function without arguments that returns "
            f"one; {came}. Put a function of z into the `forward` of a module."
        )
    return generator


@torch.no_grad()
def probed(generator: nn.Module, latent_shape: tuple[int, ...]) -> torch.Tensor:
    """Generate two samples (2, ...), to see what they are like.

    Raises:
        ConfigError: The generator does not give one sample for each z; says what came.
    """
    held = next(itertools.chain(generator.parameters(), generator.buffers()), torch.zeros(0))
    z = torch.randn(2, *latent_shape, generator=torch.Generator().manual_seed(0)).to(held.device)
    try:
        samples = generator(z.to(held.dtype) if held.is_floating_point() else z)
    except Exception as error:
        raise ConfigError(
            f"The generator cannot take z of shape {tuple(z.shape)}: {type(error).__name__}: {error}. Give the shape "
            "of one z that it takes, as a number or as in (100, 1, 1)."
        ) from error
    if not isinstance(samples, torch.Tensor) or samples.dim() < 2 or len(samples) != 2:
        raise ConfigError(
            f"The generator must map z of shape {tuple(z.shape)} to a tensor of samples (2, ...), one for each z; it "
            f"gave {_described(samples)}. Put it into a module whose `forward` gives the samples alone."
        )
    return samples


def generator_source(
    generator: Any,
    dim: int | tuple[int, ...],
    contexts: Sequence[Any] = (),
    encode: Encoder | None = None,
    bounds: tuple[float, float] | None = None,
) -> FlowSource:
    """Make the source of a generator's flow; every flow has a copy of the generator, which stays as it is.

    Args:
        generator: A module, or a function without arguments that returns one.
        dim: As `PriorFlow` takes it.
        contexts: As `PriorFlow` takes them.
        encode: As `PriorFlow` takes it.
        bounds: Least and greatest value of a sample. Samples of shape (1 or 3, H, W) with bounds (0, 1) are images.

    Raises:
        ConfigError: See `PriorFlow`; or images whose values are not in [0, 1].
    """
    is_function = callable(generator) and not isinstance(generator, nn.Module)
    given = checked_module(generator() if is_function else generator, made=is_function)
    samples = probed(sharing_tensors(given).eval(), latent_shape_of(dim))
    shape = tuple(samples.shape[1:])
    is_image = len(shape) == 3 and shape[0] in (1, 3) and bounds is not None and tuple(bounds) == (0, 1)
    if is_image and not (samples.amin() >= -1e-3 and samples.amax() <= 1 + 1e-3):
        raise ConfigError(
            f"Images have values in [0, 1], those of the generator are from {samples.min().item():.3g} to "
            f"{samples.max().item():.3g}. Bring them there in its `forward`, e.g. by `images / 2 + 0.5` from [-1, 1]."
        )

    def around(decoder: nn.Module) -> PriorFlow:
        return PriorFlow(decoder, dim, sample_shape=shape, contexts=contexts, encode=encode)

    def load(network_dtype: torch.dtype = torch.float32, frozen_dtype: torch.dtype = torch.float32) -> PriorFlow:
        flow = around(copy.deepcopy(given))
        flow.network.to(network_dtype)
        return flow

    def imitation(network_dtype: torch.dtype, frozen_dtype: torch.dtype) -> PriorFlow:
        flow = around(sharing_tensors(given))
        flow.network.to(network_dtype)
        return flow

    def skeleton() -> PriorFlow:
        with torch.device("meta"):
            return around(sharing_tensors(given))

    about = f"from latents of dimension {math.prod(latent_shape_of(dim))} through {type(given).__name__}"
    return FlowSource("", about, shape, load, skeleton, imitation, reloadable=False, is_image=is_image)


def sharing_tensors(module: nn.Module) -> nn.Module:
    """Copy a module but for its parameters and buffers, which both have then; the copy's ask for no gradients."""
    parameters = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, {**parameters, **{id(tensor): tensor.detach() for tensor in module.buffers()}})


def _described(value: Any) -> str:
    """Describe what came in place of something else."""
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
