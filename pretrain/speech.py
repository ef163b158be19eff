"""Train the flow "speech": prosodies of sentences, as a synthesiser says them and far around that.

    python pretrain/speech.py                # two minutes on one core; needs the extra [speech]
    python pretrain/speech.py --align        # says where words are, for envs/speech_data.py

The synthesiser says each sentence at three paces and as a statement, a question and an exclamation. A recogniser finds
the words, whose pitches and lengths are the prosodies that random ones are made of (`envs.speech_data.perturbed`).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from fit_flow import as_shipped, fit, save

from flowrl.envs.speech_data import ROWS, SENTENCES, TEXTS, WORDS, perturbed
from flowrl.envs.speech_judges import Recogniser
from flowrl.envs.speech_voice import HEARD, Hibari, hiss, resampled, spoken_prosody
from flowrl.functional.metrics import wasserstein2
from flowrl.functional.solvers import ode_sample, time_grid
from flowrl.functional.vocoder import HOP, RATE, Frames, synthesise
from flowrl.models.base import VelocityModel
from flowrl.models.prosody import ProsodyFlow

ASSET = Path(__file__).resolve().parent.parent / "flowrl" / "assets" / "speech"
ENDINGS, PACES = (".", "?", "!"), (0.8, 1.0, 1.25)


def edges_of(frames: Frames, text: str, recogniser: Recogniser) -> list[int]:
    """Frames where words begin, and where the last one is over."""
    n = len(frames)
    places, even = torch.arange(n, dtype=torch.float32)[None], torch.ones(1, n)
    sound = resampled(synthesise(frames, places, frames.pitch[None], even, hiss(n)), HEARD / RATE)[0]
    spans = recogniser.align(sound, text)
    if len(spans) != WORDS:
        raise SystemExit(f"{text!r}: {len(spans)} words were found, not {WORDS}.")
    return [int(time * RATE / HOP) for time in [start for start, _ in spans] + [spans[-1][1]]]


def spoken(synthesiser: Hibari, recogniser: Recogniser) -> torch.Tensor:
    """Prosodies (sentences, variants, 3, WORDS) with which the synthesiser says them."""
    said = []
    for text in TEXTS:
        variants = [(text[:-1] + ending, pace) for ending in ENDINGS for pace in PACES]
        frames = [synthesiser(*variant) for variant in variants]
        said.append(torch.stack([spoken_prosody(f, edges_of(f, text, recogniser)) for f in frames]))
    return torch.stack(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--align", action="store_true", help="print where words are, and train nothing")
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSET)
    args = parser.parse_args()
    started = time.process_time()
    synthesiser, recogniser = Hibari(), Recogniser()
    if args.align:
        for sentence in SENTENCES:
            print(sentence.text, edges_of(synthesiser(sentence.text), sentence.text, recogniser), sentence.edges)
        return
    own = spoken(synthesiser, recogniser)

    def drawn(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        which, variant = (torch.randint(k, (n,), generator=generator) for k in own.shape[:2])
        return perturbed(own[which, variant], generator), which

    many = drawn(100_000, torch.Generator().manual_seed(1))[0]
    numbers = {"centre": many.mean((0, 2)), "scale": many.transpose(0, 1).flatten(1).std(1)}
    config: dict[str, Any] = {
        "model": "prosody",
        "sentences": list(TEXTS),
        "words": WORDS,
        **{key: [round(value, 4) for value in values.tolist()] for key, values in numbers.items()},
        "width": args.width,
        "depth": args.depth,
        "description": "MLP trained on prosodies around those of a synthesiser",
    }
    torch.manual_seed(args.seed)
    flow = ProsodyFlow(*(config[key] for key in ("sentences", "words", "centre", "scale", "width", "depth")))

    def draw(n: int, generator: torch.Generator) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
        prosodies, which = drawn(n, generator)
        return flow.encode_samples(prosodies), flow.encode([TEXTS[i] for i in which])  # type: ignore[return-value]

    trained: VelocityModel = fit(flow, draw, args.steps, args.batch, args.seed)
    as_shipped(trained.network)
    generator = torch.Generator().manual_seed(2)
    w2, floor = [], []
    for i, text in enumerate(TEXTS):
        fresh = [perturbed(own[i, torch.randint(own.shape[1], (512,), generator=generator)], generator) for _ in "ab"]
        x_0, condition = torch.randn(512, len(ROWS), WORDS, generator=generator), trained.encode([text] * 512)
        with torch.no_grad():
            x_1 = ode_sample(lambda x, t, c=condition: trained(x, t, c), x_0, time_grid(10), "euler")
        a, b = (flow.encode_samples(part) for part in fresh)
        w2.append(wasserstein2(x_1, a))
        floor.append(wasserstein2(a, b))
    figures = {"w2": round(sum(w2) / len(w2), 3), "w2_floor": round(sum(floor) / len(floor), 3)}
    print(figures, f"{time.process_time() - started:.0f} s of CPU")
    trained_for = {"steps": args.steps, "batch": args.batch, "seed": args.seed}
    save(trained.network, args.out, config | {"trained": trained_for, "samples": figures})


if __name__ == "__main__":
    main()
