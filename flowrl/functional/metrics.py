"""Measures of samples: diversity, distances between clouds of points, confidence intervals."""

from __future__ import annotations

import math

import torch

from flowrl.errors import ConfigError
from flowrl.functional.transport import ot_permutation

DIVERSITY_SAMPLES = 256
"""Number of samples of an iteration that the logged diversity looks at."""
DIVERSITY_VALUES = 2**26
"""Most values of these, which stay on the device until then: 85 images of 512 pixels, 21 of 1024."""


def n_compared(samples: torch.Tensor, most: int = DIVERSITY_SAMPLES, values: int = DIVERSITY_VALUES) -> int:
    """Count the samples (B, ...) that a diversity looks at: of large ones fewer, as they are copied several times."""
    return min(most, max(2, values // samples[0].numel()))


def diversity(samples: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
    """Compute the mean Euclidean distance between two samples of the same context; a scalar tensor.

    Samples (B, ...) are flattened; context_ids (B,). NaN when no two samples share a context.
    """
    total, n_pairs = pair_distances(samples, context_ids)
    return total / n_pairs


def pair_distances(samples: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
    """Sum the Euclidean distances between two samples of the same context, and count the pairs: (2,)."""
    flat = samples.flatten(1).float()
    same = (context_ids[:, None] == context_ids[None, :]).float().to(flat.device)
    # about the mean of their context: `cdist` loses distances that are small beside the length of the samples
    flat = flat - (same @ flat / same.sum(1, keepdim=True))[same.argmax(1)]
    distance, pairs = torch.cdist(flat, flat), same.triu(1)
    return torch.stack([(distance * pairs).sum(), pairs.sum()])


def wasserstein2(a: torch.Tensor, b: torch.Tensor) -> float:
    """Compute the exact W2 distance between two clouds of points of equal size (N, ...), flattened."""
    if a.shape != b.shape:
        raise ConfigError(f"Clouds must have equal shapes, not {tuple(a.shape)} and {tuple(b.shape)}.")
    a, b = a.flatten(1).double(), b.flatten(1).double()
    index = ot_permutation(a, b, torch.zeros(len(a), dtype=torch.long, device=a.device))
    return math.sqrt((a[index] - b).square().sum(1).mean().item())


def quantile_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Compute the W1 distance between the values of two tensors of as many numbers, all of them taken together."""
    if a.numel() != b.numel():
        raise ConfigError(f"Values must be as many, not {a.numel()} and {b.numel()}.")
    return (a.flatten().double().sort().values - b.flatten().double().sort().values).abs().mean().item()


def spectrum_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Compute `sum_k |S_a(k) - S_b(k)| / sum_k S_b(k)` between the mean spectra of two sets of fields (N, n, n).

    S(k) is the energy of a cosine transform at wave numbers whose length rounds to k half waves. 0 for equal spectra,
    1 where a has no energy.
    """
    s_a, s_b = spectrum(a), spectrum(b)
    return ((s_a - s_b).abs().sum() / s_b.sum()).item()


def spectrum(fields: torch.Tensor) -> torch.Tensor:
    """Compute the mean energy at each length of wave numbers: fields (N, n, n) -> float64 (largest + 1,)."""
    n = fields.shape[-1]
    k = torch.arange(n, dtype=torch.float64, device=fields.device)
    cosines = (math.pi / n * k[:, None] * (k + 0.5)).cos() * math.sqrt(2 / n)
    cosines[0] = math.sqrt(1 / n)
    energy = (cosines @ fields.double() @ cosines.T).square().mean(0)
    length = (k[:, None].square() + k.square()).sqrt().round().long()
    return torch.zeros(int(length.max()) + 1, dtype=energy.dtype, device=energy.device).index_add_(
        0, length.flatten(), energy.flatten()
    )


def grey(images: torch.Tensor) -> torch.Tensor:
    """Compute luma (B, H, W) of images (B, 3, H, W), ITU-R BT.601; grey images (B, 1, H, W) keep their values."""
    if images.shape[1] == 1:
        return images[:, 0].float()
    return (images.float() * images.new_tensor([0.299, 0.587, 0.114]).float()[:, None, None]).sum(1)


def entropy(images: torch.Tensor) -> torch.Tensor:
    """Compute the Shannon entropy in bits, 0 to 8, of 256 grey levels: images (B, C, H, W) in [0, 1] -> (B,)."""
    levels = (255 * grey(images).clamp(0, 1)).round().long().flatten(1)
    one = torch.full_like(levels, 1 / levels.shape[1], dtype=torch.float32)
    share = torch.zeros(len(images), 256, device=images.device).scatter_add_(1, levels, one)
    return -(share * share.clamp_min(1e-12).log2()).sum(1)


def edge_density(images: torch.Tensor, threshold: float = 0.1) -> torch.Tensor:
    """Compute the share of pixels where grey changes by over `threshold`: images (B, 3, H, W) in [0, 1] -> (B,)."""
    values = grey(images)
    right, down = values[:, :-1, 1:] - values[:, :-1, :-1], values[:, 1:, :-1] - values[:, :-1, :-1]
    return ((right.square() + down.square()).sqrt() > threshold).float().mean((1, 2))


def wins(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Compute 1 where values are larger than others, 1/2 where equal and 0 where smaller; shapes broadcast."""
    return (one > other).float() + 0.5 * (one == other).float()


def mean_interval(values: torch.Tensor, clusters: torch.Tensor | None = None) -> tuple[float, float]:
    """Compute the 95 % confidence interval of the mean of values (B,), by Student's t.

    Values are independent; or, with `clusters` (B,) int64, those of different clusters are, which are themselves a few
    drawn of many (the ratio estimator of cluster sampling, Cochran 1977, eq. 9A.7).
    """
    mean, error, quantile, _ = _mean_error(values, clusters)
    return mean - quantile * error, mean + quantile * error


def share_interval(values: torch.Tensor, clusters: torch.Tensor | None = None) -> tuple[float, float]:
    """Compute the 95 % confidence interval of the mean of values (B,) that are shares: in [0, 1], as the interval is.

    As `mean_interval`, but for a spread that goes with the mean m as `m (1 - m)` (Wilson 1927): of few values, or near
    0 and 1, the same spread on either side would be too narrow and reach beyond them. Values that are all 0 or all 1
    say of the spread only that there was no other yet: theirs is taken to be that of 0 and 1.
    """
    mean, error, quantile, n = _mean_error(values, clusters)
    if math.isnan(error):
        return math.nan, math.nan
    most = mean * (1 - mean)
    reach = quantile**2 * (error**2 / most if most > 0 else 1 / (n - 1))
    middle, half = (mean + reach / 2) / (1 + reach), math.sqrt(reach * most + reach**2 / 4) / (1 + reach)
    return max(0.0, middle - half), min(1.0, middle + half)


def _mean_error(values: torch.Tensor, clusters: torch.Tensor | None) -> tuple[float, float, float, int]:
    """Give the mean of values, its standard error (NaN of one), how many of it are 95 %, and the independent values.

    Clusters of the same mean, as a few of few values often are, say nothing of how those of others differ: the error is
    that of their values then.
    """
    from scipy import special

    values = values.cpu().double()
    n, deviation = len(values), values - values.mean()
    if clusters is not None:
        drawn, index = clusters.cpu().unique(return_inverse=True)
        n, total = len(drawn), deviation.new_zeros(len(drawn)).index_add_(0, index, deviation)
        deviation = total if bool(total.norm() > 1e-6 * deviation.norm()) else deviation
    mean = values.mean().item()
    if n < 2:
        return mean, math.nan, math.nan, n
    error = math.sqrt(n / (n - 1) * deviation.square().sum().item()) / len(values)
    return mean, error, float(special.stdtrit(n - 1, 0.975)), n  # of two or three prompts much more than 1.96 errors
