"""Darcy's equation `-div(K grad p) = f` on the nodes of the unit square: stencil, residual and direct solver.

A field has values at size x size nodes, `h = 1 / (size - 1)` apart, those on the walls included. The stencil is the
finite-volume one of five points: the flux between neighbours is `-K (p' - p) / h` with the harmonic mean of their
permeabilities, as layers in series conduct (Patankar 1980, section 4.2-3). f is 1, p is 0 on the walls.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from flowrl.functional.exact import in_float64

SOURCE = 1.0
"""Source f, in units of (permeability x pressure) / length^2, the same everywhere."""
LARGEST_LOG = 10.0
"""Permeabilities beyond exp(+-10) count as exp(+-10), so that residuals are finite."""


def conductances(log_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute harmonic means of K between neighbours, from log K (..., n, n).

    Returns:
        Of vertical neighbours (..., n - 1, n), and of horizontal ones (..., n, n - 1).
    """
    log_k = log_k.clamp(-LARGEST_LOG, LARGEST_LOG)

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (math.log(2) - torch.logaddexp(-a, -b)).exp()

    return mean(log_k[..., :-1, :], log_k[..., 1:, :]), mean(log_k[..., :, :-1], log_k[..., :, 1:])


def residual(log_k: torch.Tensor, p: torch.Tensor, source: torch.Tensor | float = SOURCE) -> torch.Tensor:
    """Compute `-div(K grad p) - f` at the inner nodes (..., n - 2, n - 2), in float64, with a gradient.

    Args:
        log_k: Logarithm of the permeability, (..., n, n).
        p: Pressure (..., n, n); values on the walls are taken as they are.
        source: f, a number or (..., n - 2, n - 2).
    """
    log_k, p = in_float64(log_k), in_float64(p)
    down, right = conductances(log_k)
    flow_down = down * (p[..., 1:, :] - p[..., :-1, :])  # K dp, (..., n - 1, n)
    flow_right = right * (p[..., :, 1:] - p[..., :, :-1])
    divergence = flow_down[..., 1:, 1:-1] - flow_down[..., :-1, 1:-1]
    divergence = divergence + flow_right[..., 1:-1, 1:] - flow_right[..., 1:-1, :-1]
    return -divergence * (p.shape[-1] - 1) ** 2 - source


def solve(log_k: torch.Tensor, source: torch.Tensor | float = SOURCE) -> torch.Tensor:
    """Solve the equations of `residual` = 0 with p = 0 on the walls, by a sparse direct solver, one field at a time.

    Args:
        log_k: Logarithm of the permeability, (B, n, n).
        source: f, a number or (B, n - 2, n - 2).

    Returns:
        Pressure (B, n, n) in the type and on the device of `log_k`. Without a gradient.
    """
    from scipy.sparse import csc_matrix
    from scipy.sparse.linalg import splu

    n = log_k.shape[-1]
    m, h2 = n - 2, (n - 1) ** 2
    down, right = (c.numpy() for c in conductances(log_k.detach().cpu().double()))
    f = torch.as_tensor(source, dtype=torch.float64).cpu().expand(len(log_k), m, m).numpy()
    number = np.arange(m * m).reshape(m, m)
    pairs = [(number[:-1], number[1:]), (number[:, :-1], number[:, 1:])]
    rows = np.concatenate([number.ravel(), *(x.ravel() for a, b in pairs for x in (a, b))])
    columns = np.concatenate([number.ravel(), *(x.ravel() for a, b in pairs for x in (b, a))])
    p = np.zeros((len(log_k), n, n))
    for i in range(len(log_k)):
        d, r = down[i], right[i]
        centre = d[1:, 1:-1] + d[:-1, 1:-1] + r[1:-1, 1:] + r[1:-1, :-1]
        between = [x.ravel() for x in (d[1:-1, 1:-1], r[1:-1, 1:-1]) for _ in range(2)]
        values = np.concatenate([centre.ravel(), *(-x for x in between)]) * h2
        matrix = csc_matrix((values, (rows, columns)), shape=(m * m, m * m))
        factors = splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        p[i, 1:-1, 1:-1] = factors.solve(f[i].ravel()).reshape(m, m)
    return torch.from_numpy(p).to(log_k)


def sines(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute eigenvectors of the second difference at the inner nodes of a line of `size` nodes: orthonormal,
    symmetric (size - 2, size - 2) float64, and the eigenvalues of its negative over h^2, (size - 2,).

    They diagonalise the stencil for K = 1: `-laplace = S (l_i + l_j) S`.
    """
    k = torch.arange(1, size - 1, dtype=torch.float64)
    vectors = math.sqrt(2 / (size - 1)) * (math.pi * k[:, None] * k / (size - 1)).sin()
    return vectors, (2 * (size - 1) * (math.pi * k / (2 * (size - 1))).sin()).square()


def energy(residuals: torch.Tensor) -> torch.Tensor:
    """Compute `<r, (-laplace)^-1 r>` of residuals (B, n - 2, n - 2), mean over nodes: (B,), with a gradient.

    For K = 1 it is the energy `|grad e|^2` of the error e of p, whose squared residual is `(laplace e)^2`: it is about
    an error's extent where the squared residual is about its differences from node to node.
    """
    vectors, values = (part.to(residuals) for part in sines(residuals.shape[-1] + 2))
    return ((vectors @ residuals @ vectors).square() / (values[:, None] + values)).mean((1, 2))
