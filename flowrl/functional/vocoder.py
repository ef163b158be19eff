"""Waveforms from a spectral envelope and a pitch: a source-filter vocoder, batched and differentiable.

Frames come every `HOP` values of a waveform of `RATE` per second. The spectrum of a frame is

    S = exp(lh) e^(i pi tanh(theta)) E + exp(ln) Z + exp(lr) e^(i phi)

with E the spectrum of a train of pulses at the pitch, Z complex Gaussian noise, and the rest from a synthesiser: the
interface that `hibari-tts` documents for its network's outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

RATE, HOP, N_FFT = 24_000, 300, 1_200
BINS = N_FFT // 2 + 1
LOWEST, HIGHEST = 40.0, 11_000.0
"""In Hz: frames of a lower pitch are unvoiced; the source has harmonics up to the other."""
LARGEST_LOG = 7.0


@dataclass(frozen=True)
class Frames:
    """What a synthesiser gives for an utterance of F frames.

    Attributes:
        harmonic: Logarithm of the harmonic part's envelope, lh (BINS, F).
        theta: Phase of the harmonic part before the tanh (BINS, F).
        noise: Logarithm of the noise's envelope, ln (BINS, F).
        free: Logarithm of the magnitude of the part with a phase of its own, lr (BINS, F).
        phi: That phase (BINS, F).
        pitch: In Hz, 0 where unvoiced (F,).
    """

    harmonic: torch.Tensor
    theta: torch.Tensor
    noise: torch.Tensor
    free: torch.Tensor
    phi: torch.Tensor
    pitch: torch.Tensor

    def __len__(self) -> int:
        return len(self.pitch)


def warp(lengths: torch.Tensor, n_frames: int) -> torch.Tensor:
    """Find the places in the original of the frames of an utterance whose frames are made longer or shorter.

    Args:
        lengths: New length of each original frame (B, F), in frames, positive.
        n_frames: Frames wanted.

    Returns:
        Places (B, n_frames) in [0, F - 1], the last one where the utterance is over; differentiable by `lengths`.
    """
    ends = lengths.cumsum(1)
    middles = ends - lengths / 2  # of the original frames, in new time
    wanted = (torch.arange(n_frames, device=lengths.device) + 0.5).expand(len(lengths), -1)
    last = lengths.shape[1] - 1
    right = torch.searchsorted(middles.detach().contiguous(), wanted.contiguous()).clamp(1, last)
    left = right - 1
    a, b = middles.gather(1, left), middles.gather(1, right)
    return (left + ((wanted - a) / (b - a)).clamp(0, 1)).clamp(0, last)


def at_places(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Interpolate values (..., F) linearly at places (B, n), all rows at each: (B, ..., n)."""
    left = places.detach().floor().long().clamp(0, values.shape[-1] - 2)
    share = (places - left).view(len(places), *[1] * (values.dim() - 1), -1)
    lower, upper = (values[..., index].movedim(-2, 0) for index in (left, left + 1))
    return lower + share * (upper - lower)


def at_each(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Interpolate values (B, F) linearly at places (B, n), each row at its own: (B, n)."""
    left = places.detach().floor().long().clamp(0, values.shape[1] - 2)
    lower, upper = values.gather(1, left), values.gather(1, left + 1)
    return lower + (places - left) * (upper - lower)


def filled_pitch(pitch: torch.Tensor) -> torch.Tensor:
    """Interpolate the pitch (F,) in Hz linearly where it is unvoiced; constant before the first and after the last."""
    voiced = (pitch > LOWEST).nonzero()[:, 0]
    if len(voiced) == 0:
        return torch.full_like(pitch, LOWEST)
    places = torch.arange(len(pitch), device=pitch.device)
    right = torch.searchsorted(voiced, places).clamp(1, max(len(voiced) - 1, 1))
    a, b = voiced[right - 1], voiced[right.clamp_max(len(voiced) - 1)]
    share = ((places - a) / (b - a).clamp_min(1)).clamp(0, 1)
    return pitch[a] + share * (pitch[b] - pitch[a])


def pulses(pitch: torch.Tensor) -> torch.Tensor:
    """Make pulse trains (B, F * HOP) of pitches (B, F) in Hz: the sum of the cosines of all harmonics up to HIGHEST.

    `sum_h cos(h a) = sin((H + 1/2) a) / (2 sin(a / 2)) - 1/2`; zero where the pitch is below LOWEST.
    """
    fine = F.interpolate(pitch[:, None].double(), scale_factor=HOP, mode="linear", align_corners=False)[:, 0]
    voiced = fine > LOWEST
    fine = fine.clamp_min(LOWEST)
    angle = 2 * math.pi * ((fine / RATE).cumsum(1) % 1)
    harmonics = (HIGHEST / fine.detach()).floor()
    below = 2 * (angle / 2).sin()
    flat = below.abs() < 2e-3
    ratio = ((harmonics + 0.5) * angle).sin() / torch.where(flat, 1.0, below)
    return torch.where(voiced, torch.where(flat, harmonics + 0.5, ratio) - 0.5, 0.0).float()


def synthesise(
    frames: Frames, places: torch.Tensor, pitch: torch.Tensor, gain: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Synthesise waveforms (B, n * HOP) of frames at places (B, n) of an utterance.

    Args:
        frames: The utterance.
        places: Places in it, such as `warp` gives.
        pitch: In Hz, 0 where unvoiced (B, n).
        gain: Factor of the amplitude (B, n).
        noise: Z, complex (BINS, n) or (B, BINS, n).
    """
    n = places.shape[1]
    window = torch.hann_window(N_FFT, device=places.device)
    source = torch.stft(pulses(pitch), N_FFT, HOP, window=window, return_complex=True)[:, :, :n] / HOP
    parts = torch.stack([frames.harmonic, frames.theta, frames.noise, frames.free])
    harmonic, theta, hiss, free = at_places(parts, places).unbind(1)
    phi = frames.phi[:, places.detach().round().long()].movedim(1, 0)  # an angle: never between two frames
    envelope, aspiration, magnitude = (part.clamp_max(LARGEST_LOG).exp() for part in (harmonic, hiss, free))
    spectrum = torch.polar(envelope, math.pi * theta.tanh()) * source + aspiration * noise + torch.polar(magnitude, phi)
    spectrum = spectrum * gain[:, None]
    padded = F.pad(spectrum, (0, 1))  # istft wants the frame that is centred on the end
    return torch.istft(padded, N_FFT, HOP, window=window, length=n * HOP)
