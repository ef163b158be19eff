"""Several processes: the same run as one process, faster; and an end when one of them dies."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks_worker
import torch
from conftest import made_once

import flowrl
from flowrl.distributed.ranks import Ranks, SharedGenerator, join
from flowrl.errors import ConfigError
from flowrl.functional.flow import drawn

pytestmark = pytest.mark.timeout(600)  # whoever comes first waits for all cases of two processes

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def environment(program_environment: dict[str, str]) -> dict[str, str]:
    return {**program_environment, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> dict[str, Any]:
    """What two processes on the CPU (gloo) logged, by case."""

    def make(folder: Path) -> None:
        command = [sys.executable, str(Path(ranks_worker.__file__)), str(folder), free_port()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stderr[-4000:]

    folder = made_once(tmp_path_factory, "ranks", make)
    return {**json.loads((folder / "two.json").read_text()), "folder": folder}


@pytest.fixture(scope="module")
def of_one() -> Callable[[str], dict[str, Any]]:
    """What one process logs of a case."""
    return functools.cache(ranks_worker.run)


@pytest.mark.parametrize("case", [*ranks_worker.cases(), *(f"{name}, divided" for name in ranks_worker.DIVIDED)])
def test_two_processes_do_what_one_does(
    case: str, of_one: Callable[[str], dict[str, Any]], of_two: dict[str, Any]
) -> None:
    one, two = of_one(case.removesuffix(", divided")), of_two[case]
    assert two["ranks agree"]
    assert two["own rows of the buffer"] == one["own rows of the buffer"] // 2
    assert two["cost"] == one["cost"]
    # diversity is of pairs within each process; kl has errors of a solver with adaptive steps; adjoint's loss divides
    # by the noise of late times, which carries rounding (2e-5 between two CPUs) on; transport depends on which of equal
    # samples gets which noise
    close = {"kl": 2e-4, "adjoint": 2e-4, "transport": 0.1, "transport, contexts": 0.1}.get(case, 1e-5)
    for i, (ours, theirs) in enumerate(zip(one["rows"], two["rows"])):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - ({"time/network_evaluations"} if case == "kl" else set()):
            tolerance = 1e-5 if (i, key) == (0, "rollout/reward_mean") else close
            tolerance = 0.1 if key == "rollout/diversity" else tolerance
            assert theirs[key] == pytest.approx(ours[key], rel=tolerance, abs=tolerance, nan_ok=True), key
    assert two["evaluation"] == pytest.approx(one["evaluation"], rel=max(close, 1e-4), abs=max(close, 1e-4))


@pytest.mark.parametrize("case", ranks_worker.DIVIDED[:2])
def test_one_process_reads_what_two_that_divide_weights_wrote(case: str, of_two: dict[str, Any]) -> None:
    name = f"{case}, divided"
    loaded = flowrl.ORWCFMW2.load(of_two["folder"] / name, device="cpu")
    assert ranks_worker.weight_sums(loaded).tolist() == pytest.approx(of_two[name]["saved"], rel=1e-12, abs=1e-12)
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.last_logged["rollout/reward_mean"] == pytest.approx(
        of_two[name]["rows"][2]["rollout/reward_mean"], abs=1e-5
    )


class Imagined(Ranks):
    """Rank `index` of `count`, without the others."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        self.rank, self.world_size = index, count


def test_gradients_are_averaged_together_whatever_their_type_layout_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = (3, 2), (600, 600), (5,), (4, 3, 2, 2), ()
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters += [torch.nn.Parameter(torch.zeros(7, dtype=torch.bfloat16)), torch.nn.Parameter(torch.zeros(2))]
    for i, parameter in enumerate(parameters[:-1]):  # the last has none
        parameter.grad = torch.full_like(parameter, i + 1.0)
    parameters[3].grad = torch.arange(48.0).view(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    calls = []

    def all_reduce_(ranks: Ranks, tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor.dtype)
        return tensor.mul_(6)  # of another rank that has five times as much

    monkeypatch.setattr(Imagined, "all_reduce_", all_reduce_)
    Imagined(0, 2).average_gradients(parameters)
    for i in (0, 1, 2, 4, 5):
        assert (parameters[i].grad == 3 * (i + 1.0)).all()
    assert torch.equal(parameters[3].grad, 3 * torch.arange(48.0).view(4, 3, 2, 2))
    assert parameters[-1].grad is None
    assert sorted(map(str, calls)) == ["torch.bfloat16", "torch.float32", "torch.float32"]  # the large one by itself


@pytest.mark.parametrize(("n", "count", "group"), [(8, 2, 1), (7, 3, 1), (24, 3, 4), (10, 4, 2), (9, 2, 4)])
def test_rows_are_divided_whole(n: int, count: int, group: int) -> None:
    rows = torch.arange(n)
    parts = [Imagined(i, count).shard(rows, group) for i in range(count)]
    assert torch.equal(torch.cat(parts), rows)
    assert all(len(part) % group == 0 for part in parts[:-1])
    assert max(map(len, parts)) - min(map(len, parts)) <= group


def test_what_is_random_is_drawn_for_all() -> None:
    def noise(index: int, count: int) -> torch.Tensor:
        generator = SharedGenerator("cpu", Imagined(index, count))
        generator.manual_seed(0)
        return drawn(lambda n: torch.randn(n, 3, generator=generator), 6 // count, generator)

    assert torch.equal(torch.cat([noise(i, 3) for i in range(3)]), noise(0, 1))
    assert not torch.equal(noise(0, 2), noise(1, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_samples": 9}, "n_samples = 9 is no multiple of 2"),
        ({"n_samples": 12, "rollout_batch_size": 3}, "rollout_batch_size = 3"),
        ({"batch_size": 5}, "batch_size = 5"),
        ({"n_samples": 10, "batch_size": 4}, None),
        ({"n_samples": 6, "batch_size": 4, "group_size": 3}, None),
    ],
)
def test_batches_that_cannot_be_shared_evenly(settings: dict[str, Any], message: str | None) -> None:
    config = flowrl.ORWCFMW2.Config(**settings)
    config.check_ranks(1)
    if message is None:
        config.check_ranks(2)
        return
    with pytest.raises(ConfigError, match=message):
        config.check_ranks(2)


def test_branches_need_whole_groups_on_each_process() -> None:
    config = flowrl.FlowGRPO.Config(n_samples=16, batch_size=16, group_size=8, branch=True, window=2)
    config.check_ranks(2)
    with pytest.raises(ConfigError, match="whole groups on each of 4 processes"):
        config.check_ranks(4)


def test_a_part_of_the_settings_holds_what_one_of_several_holds() -> None:
    config = flowrl.FlowGRPO.Config(n_samples=96, rollout_batch_size=48, batch_size=32, group_size=8)
    part = config.of_one_rank(4)
    assert (part.n_samples, part.rollout_batch_size, part.batch_size) == (24, 12, 8)
    assert config.of_one_rank(32).n_samples == 8  # a whole group at least


def test_a_numbered_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--device cuda, not cuda:1"):
        join("cuda:1")


def test_processes_that_are_not_joined_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("flowrl.distributed.ranks._joined", [])
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: SimpleNamespace(num_processes=1, process_index=0))
    with pytest.raises(ConfigError, match=r"does not join the 2 processes .* 'mps' here: take --device cpu"):
        join("mps")


ENDLESS = ["-m", "flowrl.run", "--algo", "orw_w2", "--env", "gaussians-linear", "--device", "cpu", "--name", "a"]


def started(tmp_path: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Two processes that train without end, once their first checkpoint is there."""
    arguments = [*ENDLESS, "--total-timesteps", str(10**9), "--checkpoint-every", "1", "--picture-every", str(10**6)]
    job = subprocess.Popen(
        [*LAUNCH, free_port(), *arguments],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while not list((tmp_path / "runs").glob("a/checkpoints/[0-9]*/state.json")):
        assert job.poll() is None, job.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return job


def children(job: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_process_that_dies_ends_the_job(tmp_path: Path, environment: dict[str, str]) -> None:
    job = started(tmp_path, environment)
    try:
        os.kill(children(job)[1], signal.SIGKILL)
        output, _ = job.communicate(timeout=60)  # within a minute
    finally:
        job.kill()
    assert job.returncode != 0
    assert "SIGKILL" in output
    model = flowrl.ORWCFMW2.load(tmp_path / "runs" / "a", device="cpu")  # one process goes on
    before = model.num_timesteps
    model.learn(512, reset_num_timesteps=False)
    assert model.num_timesteps == before + 512


@pytest.fixture(scope="module")
def starter(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything and starts pairs of others."""
    command = [sys.executable, str(Path(ranks_worker.__file__))]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()  # type: ignore[union-attr]


class Pair:
    """Two processes of a program without a launcher, in a folder."""

    def __init__(self, starter: subprocess.Popen[str], folder: Path, program: str, *arguments: object) -> None:
        given: dict[str, Any] = {"folder": str(folder), "port": free_port(), "path": str(folder), "program": program}
        given["arguments"] = [*map(str, arguments)]
        self.starter, self.folder = starter, folder
        print(json.dumps(given), file=starter.stdin, flush=True)
        self.pids: list[int] = self._answer(60)
        self.codes: list[int] = []

    def _answer(self, seconds: float) -> list[int]:
        assert select.select([self.starter.stdout], [], [], seconds)[0], "no answer"
        return json.loads(self.starter.stdout.readline())  # type: ignore[union-attr]

    def wait(self, seconds: float = 60) -> list[str]:
        """What each wrote to its errors until both had ended, with `codes`."""
        self.codes = self._answer(seconds)
        return [(self.folder / f"errors-{rank}").read_text() for rank in range(2)]

    def end(self) -> None:
        if not self.codes:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            self.wait()


@pytest.fixture
def run_pair(tmp_path: Path, starter: subprocess.Popen[str]) -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def run(*arguments: object, program: str = "flowrl.run") -> Pair:
        pairs.append(Pair(starter, tmp_path, program, *arguments))
        return pairs[-1]

    yield run
    for pair in pairs:
        pair.end()


@pytest.fixture
def pair(tmp_path: Path, run_pair: Callable[..., Pair]) -> Pair:
    """Two processes without a launcher that train without end, once their first checkpoint is there."""
    pair = run_pair(*ENDLESS[2:], "--total-timesteps", 10**9, "--checkpoint-every", 1)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "runs").glob("a/checkpoints/[0-9]*/state.json")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return pair


def test_a_survivor_without_a_launcher_says_what_happened(pair: Pair) -> None:
    os.kill(pair.pids[1], signal.SIGKILL)
    errors, _ = pair.wait()
    assert pair.codes == [2, -signal.SIGKILL], errors[-3000:]
    assert "error (process 1 of 2): Another process of this job ended" in errors
    assert "go on with: python -m flowrl.run --resume runs/a" in errors


def test_a_signal_to_one_stops_all(pair: Pair, tmp_path: Path) -> None:
    os.kill(pair.pids[1], signal.SIGTERM)
    errors = pair.wait()
    assert pair.codes == [3, 3], errors
    assert flowrl.ORWCFMW2.load(tmp_path / "runs" / "a", device="cpu").num_timesteps > 0


REWARD = """
import os
import flowrl

@flowrl.register_env("broken", flow="gaussians")
def broken(samples, contexts):
    if os.environ["RANK"] == "1":
        raise ValueError("no such judge")
    return samples[:, 0]
"""


def test_an_error_of_one_process_ends_the_job_and_is_told(tmp_path: Path, run_pair: Callable[..., Pair]) -> None:
    (tmp_path / "broken.py").write_text(REWARD)
    pair = run_pair("--algo", "orw_w2", "--env", "broken:broken", "--device", "cpu")
    errors = pair.wait()
    assert pair.codes == [2, 2], errors
    assert "error (process 2 of 2): The reward of 'broken" in errors[1]
    assert "no such judge" in errors[1]


def test_a_whole_run_of_two_processes(tmp_path: Path, run_pair: Callable[..., Pair]) -> None:
    small = ["--total-timesteps", 128, "--algo.n-samples", 64, "--algo.batch-size", 32, "--eval-samples", 65]
    pair = run_pair("--algo", "raft", "--env", "gaussians-linear", *small, "--name", "b")  # on the device that is found
    errors = pair.wait(100)
    assert pair.codes == [0, 0], errors
    output = (tmp_path / "output").read_text()
    assert output.count("algorithm: raft") == 1  # one of them speaks
    assert "and 1 more, which share every batch" in output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]
    for file in ("report.html", "evaluation.json", "metrics.csv", "final/policy.safetensors"):
        assert (tmp_path / "runs" / "b" / file).exists(), file

    pair = run_pair("--resume", "runs/b", "--total-timesteps", 192)
    errors = pair.wait(100)
    assert pair.codes == [0, 0], errors
    assert "and 1 more, which share every batch" in (tmp_path / "output").read_text()

    before = len((tmp_path / "output").read_text())
    pair = run_pair("runs/b", "--n-samples", 33, program="flowrl.evaluate")
    errors = pair.wait(100)
    assert pair.codes == [0, 0], errors
    said = (tmp_path / "output").read_text()[before:]
    assert [said.count(text) for text in ("algorithm: raft", "(33 samples)", "written: ")] == [1, 1, 1]


UNEVEN = """
import os
import flowrl

@flowrl.register_env("uneven", flow="gaussians")
def uneven(samples, contexts):
    values = [("own of 0", 5.0), ("both", 1.0), (3, 2.0)], [(3, 2.0), ("own of 1", 7.0), ("both", 1.0)]
    parts = {name: samples[:, 0] * 0 + value for name, value in values[int(os.environ["RANK"])]}
    return flowrl.RewardOutput(samples[:, 0], parts)
"""


def test_components_are_put_together_by_their_names(tmp_path: Path, run_pair: Callable[..., Pair]) -> None:
    """As many on both, of which some are not there on the other, and none in the same place."""
    (tmp_path / "uneven.py").write_text(UNEVEN)
    small = ["--total-timesteps", 64, "--algo.n-samples", 64, "--algo.batch-size", 32, "--eval-samples", 32]
    pair = run_pair("--algo", "raft", "--env", "uneven:uneven", *small, "--name", "a", "--picture-every", 100)
    errors = pair.wait(100)
    assert pair.codes == [0, 0], errors
    row = json.loads((tmp_path / "runs" / "a" / "metrics.json").read_text().splitlines()[0])
    assert {key: value for key, value in row.items() if key.startswith("reward/")} == {"reward/both": 1, "reward/3": 2}
    assert json.loads((tmp_path / "runs" / "a" / "evaluation.json").read_text())["components"] == {"both": 1, "3": 2}
