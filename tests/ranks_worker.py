"""What `test_ranks.py` runs in one process and in two.

`python ranks_worker.py FOLDER PORT` starts both, and writes what each case logged.

`python ranks_worker.py` starts a pair of a program, such as `flowrl.run`, for every line that it reads, {"folder",
"port", "path", "program", "arguments"}: it writes a line of their process ids, and one of their exit codes when both
have ended. What they print is in the folder, in `output` and `errors-RANK`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

import flowrl
from flowrl.distributed.ranks import join
from flowrl.distributed.sharding import unsharded
from flowrl.envs.base import GenerationEnv
from flowrl.envs.rewards.count import count_components
from flowrl.models.base import VelocityModel
from flowrl.models.loading import source_of
from flowrl.registry import ALGORITHMS
from flowrl.types import Condition, Contexts, RewardOutput

SMALL: dict[str, Any] = {
    "n_samples": 64,
    "rollout_batch_size": 32,  # two chunks
    "batch_size": 32,
    "n_epochs": 2,
    "accumulation": 3,  # of which the last gradient step of an iteration has fewer
    "group_size": 8,
}
SEVERAL: dict[str, Any] = {"reward_aggregation": "gdpo", "lora_rank": 4, "learning_rate": 1e-5}
PROMPTS = ("three red stars on blue", "two green squares on black", "one white circle on black", "two blue squares")
SMALLER: dict[str, Any] = {"resolution": 32, "prompts": PROMPTS}  # at which rewards differ in most groups, too
PICTURES: dict[str, Any] = {"n_samples": 8, "batch_size": 8, "rollout_steps": 2, "group_size": 4, "n_epochs": 1}
"""Of the shipped network. With matrices as small as those of tests/small_pipelines.py one and two processes differ, in
float32, by 1e-5 to 3e-4 of the first gradient, and by 1e-2 of what cancels (the drift after a few steps, v - v_ref).
That is rounding and no fault of how work is divided: in float64 every figure agrees within 1e-11, three iterations on
(but diversity, which is of each process's own pairs).
"""


class PartlyUsed(torch.nn.Module):
    """A network with weights that no velocity depends on, and with an attribute that its flow asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.config = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2), {"scale": 0.5}
        torch.nn.init.zeros_(self.used.weight)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        v: torch.Tensor = self.used(torch.cat([x_t, t[:, None]], dim=1))
        return v


class PartlyUsedFlow(VelocityModel):
    """A flow that reads its network's configuration in every pass."""

    latent_shape = sample_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.network = PartlyUsed()

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        config: Any = self.network.config
        return config["scale"] * self.network(x_t, t)


class PartlyUsedEnv(GenerationEnv):
    """The first number of a sample is its reward."""

    def __init__(self) -> None:
        super().__init__(source_of(PartlyUsedFlow, (2,)), [None], low=-99, high=99, name="partly-used")

    def reward(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        return RewardOutput(samples[:, 0])


OWN: dict[str, dict[str, Any]] = {
    "draft": {"rollout_batch_size": 0},  # each minibatch is drawn by itself
    "refl": {"rollout_batch_size": 0},
    "kl": {"tolerance": 1e-5},
    "orw_w2": {"ema_decay": 0.9, "refresh_every": 2},
    "tilt": {"pool": 64},
}
OUTSIDE: dict[str, dict[str, Any]] = {
    "dpo:DPO": {"batch_size": 8},
    "draft:DRaFT": {"n_epochs": 1, "accumulation": 1},
    "fpo:FPO": {},
    "tilt:Tilt": {"pool": 64},
}
"""Algorithms of tests/outside that are written otherwise than flowrl's own, and their settings."""


def cases() -> dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """Algorithm, environment (a name, or its class), its settings, and those of the algorithm, by name."""
    found: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]] = {}
    for name in ALGORITHMS:
        own = OWN.get(name, {})
        found[name] = (name, "gaussians-linear", {}, SMALL | own)
        if name in ("orw_w2", "dpok", "flow_grpo"):
            found[f"{name}, LoRA"] = (name, "gaussians-linear", {}, SMALL | own | {"lora_rank": 4})
    for name in OUTSIDE:
        found[name] = (f"outside.{name}", "gaussians-linear", {}, SMALL | OUTSIDE[name])
    found["transport"] = ("orw_w2", "gaussians-linear", {}, SMALL | {"coupling": "ot", "target": "plain"})
    alike = {"coupling": "c2ot", "target": "plain", "context_weight": 0.1, "priority": 0.0}
    found["transport, contexts"] = ("orw_w2", "sd3-count", SMALLER, PICTURES | alike)
    found["partly used"] = ("orw_w2", PartlyUsedEnv, {}, SMALL)
    found["own noise"] = ("nft", "gaussians-linear", {}, SMALL | {"coupling": "rectified", "noisings": 2})
    found["times"] = (
        "orw_w2",
        "gaussians-linear",
        {},
        SMALL | {"time_weighting": "variance", "max_time": 0.7, "late_anchor": 0.2},
    )
    found["held"] = ("orw_w2", "gaussians-linear", {}, SMALL | {"max_own_loss": 1.0, "max_drift": 0.05})
    found["priority"] = (
        "nft",
        "gaussians-linear",
        {},
        SMALL | {"priority": 0.8, "paired_noise": True, "lr_schedule": "linear"},
    )
    found["branches"] = ("flow_grpo", "gaussians-linear", {}, SMALL | {"branch": True, "window": 2, "ratio": "guard"})
    found["pictures"] = ("orw_w2", "sd3-count", SMALLER, PICTURES)
    found["pictures, LoRA"] = ("flow_grpo", "sd3-count", SMALLER, PICTURES | {"lora_rank": 4})
    found["shared draws"] = ("fpo", "gaussians-linear", {}, SMALL | {"shared": True, "draws": 3})
    found["masked"] = ("flow_grpo", "gaussians-linear", {}, SMALL | {"mask": "dppo", "dppo_delta": 1e-4})
    two = SMALLER | {"reward": "colourfulness:1+count:0.5"}
    found["several rewards"] = ("dgpo", "sd3-count", two, PICTURES | SEVERAL)
    found["ties"] = ("flow_dpo", "sd3-count", {"prompts": PROMPTS}, PICTURES | {"group_size": 2, "lora_rank": 4})
    mixture = SMALLER | {"reward": "colourfulness:1:running+winrate(count):0.5"}
    found["mixture"] = ("raft", "sd3-count", mixture, PICTURES | {"group_size": 2, "n_best": 1, "lora_rank": 4})
    return found


DIVIDED = ("orw_w2", "orw_w2, LoRA", "flow_grpo, LoRA", "pictures, LoRA")
DIVIDED = DIVIDED if hasattr(torch.cpu.Stream, "record_event") else ()  # torch 2.6 divides none on a CPU
"""Cases that are also trained with weights divided among the processes."""


def divide_weights() -> None:
    """Join as under `accelerate launch` with FSDP, which takes accelerators only: here it is put in afterwards."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = join("cpu").accelerator.state
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap"
    )


RELOADED = ("ddpo", "dpok", "mixture", "orw_w2, LoRA")
"""Cases that are saved and loaded by several processes; all that are divided are, too."""


def weight_sums(model: flowrl.FlowAlgorithm) -> torch.Tensor:
    """Sum of each trained parameter, float64."""
    return torch.stack([unsharded(p.detach()).double().sum() for p in model.policy.parameters_of("current").values()])


THREE = (*RELOADED, *DIVIDED, "orw_w2", "held")
"""Cases of three iterations: those that are loaded before the third, or whose old policy lags behind; else two."""


def run(name: str, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train a case for two or three iterations and evaluate it; before the third it may be saved and loaded."""
    algo, env, env_settings, settings = cases()[name]
    env = env if isinstance(env, str) else env()
    model = flowrl.algorithm_class(algo)("FlowPolicy", env, seed=3, device="cpu", env_settings=env_settings, **settings)
    rows, saved = [], None
    for i in range(3 if name in THREE else 2):
        if i == 2 and checkpoint is not None:
            saved = weight_sums(model).tolist()
            model.save(checkpoint)
            torch.distributed.barrier()
            model = type(model).load(checkpoint, device="cpu")
        model.learn(settings["n_samples"], reset_num_timesteps=False)
        rows.append({key: value for key, value in model.last_logged.items() if "per_second" not in key})
    result = flowrl.evaluate(model, n_samples=10, batch_size=6, samples_per_context=2)  # nothing divides evenly
    weights = weight_sums(model)
    everywhere = model.ranks.all_gather(weights[None], model.ranks.world_size)
    return {
        "rows": rows,
        "evaluation": {"reward": result.reward_mean, "before": result.reference.reward_mean, "drift": result.drift},
        "cost": result.evaluations_per_sample,
        "own rows of the buffer": len(model.buffer.x_1),
        "saved": saved,
        "ranks agree": bool((everywhere == everywhere[0]).all()),
    }


def write_all(folder: Path) -> None:
    """Run all cases, and write what they logged."""
    written = {name: run(name, folder / name if name in RELOADED else None) for name in cases()}
    divide_weights()
    written |= {f"{name}, divided": run(name, folder / f"{name}, divided") for name in DIVIDED}
    if join().is_main:
        (folder / "two.json").write_text(json.dumps(written))


def join_as(rank: int, port: str) -> None:
    """Put into the environment what a launcher tells each of two processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))


def main(folder: Path, port: str) -> int:
    """Both processes, as a launcher would start them; forked when everything is imported, which takes longest."""
    import accelerate
    import peft
    import torchdiffeq
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

    import flowrl.models.families

    parts = AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline  # diffusers imports what is asked for
    assert all((accelerate, peft, torchdiffeq, flowrl.models.families, *parts))
    count_components(torch.zeros(1, 3, 16, 16), PROMPTS[:1])  # which learns its templates
    gc.freeze()  # a look at all that was imported takes a tenth of the time
    other = os.fork()
    join_as(1 if other == 0 else 0, port)
    try:
        write_all(folder)
    except BaseException:
        traceback.print_exc()
        if other:
            os.kill(other, signal.SIGKILL)
        os._exit(1)
    if other == 0:
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])


def run_as(rank: int, folder: str, port: str, path: str, program: str, arguments: list[str]) -> None:
    """Be a process that runs a program, from its first line to its exit code."""
    code = 70
    try:
        join_as(rank, port)
        os.chdir(folder)
        sys.path.insert(0, path)
        for stream, name in (1, "output"), (2, f"errors-{rank}"):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        code = importlib.import_module(program).main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_pairs() -> int:
    """Start a pair of a program for every line of the input, one pair after the other; forked, as above."""
    import accelerate

    import flowrl.evaluate
    import flowrl.run

    assert all((accelerate, flowrl.evaluate, flowrl.run))
    for line in sys.stdin:
        pids: list[int] = []
        for rank in range(2):
            pids.append(os.fork())
            if not pids[-1]:
                run_as(rank, **json.loads(line))
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]) if sys.argv[1:] else start_pairs())
