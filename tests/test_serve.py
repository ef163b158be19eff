"""The reward server, run as a user runs it, asked by the reward `remote` and by hand."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

import flowrl
from flowrl.envs.rewards import REWARDS, wire
from flowrl.envs.rewards.aesthetic import ColourfulnessReward
from flowrl.envs.rewards.remote import RemoteReward
from flowrl.errors import RewardError
from flowrl.serve import ServedReward, Service, application, main

TOKEN = "a-token-of-the-tests"
PROBE = """
import threading
import time
from pathlib import Path

import flowrl

RUNNING = threading.Semaphore(1)


@flowrl.register_reward("probe")
class Probe:
    '''Mean of each sample; a context may ask for trouble.'''

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, samples, contexts):
        alone = RUNNING.acquire(blocking=False)
        kind, _, folder = str(contexts[0]).partition(":")
        if kind == "raise":
            RUNNING.release()
            raise KeyError("/a/path of the reward")
        if kind == "wait":
            (Path(folder) / "running").touch()
            while not (Path(folder) / "go on").exists():
                time.sleep(0.01)
        time.sleep(0.002)
        if alone:
            RUNNING.release()
        reward = self.factor * samples.flatten(1).mean(1)
        if kind == "nan":
            reward[0] = float("nan")
        if kind == "short":
            reward = reward[1:]
        alone = samples.new_full((len(samples),), float(alone))
        return flowrl.RewardOutput(reward, {"alone": alone})
"""


class Server(NamedTuple):
    url: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def serving(folder: Path, environment: dict[str, str], *args: object) -> Iterator[Server]:
    """A server on a free port."""
    (folder / "probes.py").write_text(PROBE)
    command = [sys.executable, "-m", "flowrl.serve", "--port", "0", *map(str, args)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "FLOWRL_REWARD_TOKEN": TOKEN},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        head = next((line for line in process.stdout if line.startswith("serving ")), "")
        assert head, (folder / "log").read_text()
        yield Server(head.split()[-1], process, folder / "log")
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(program_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("colourfulness")
    limits = ("--max-batch", 8, "--max-body-mb", 1)
    with serving(folder, program_environment, "--reward", "colourfulness", *limits) as running:
        yield running


@pytest.fixture(scope="module")
def probe(program_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("probe")
    options = ("--reward", "probes:probe", "--reward-options", "probes:probe.factor=2")
    with serving(folder, program_environment, *options) as running:
        yield running


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_TOKEN", TOKEN)


def client(server: Server, **options: Any) -> RemoteReward:
    return RemoteReward(server.url, token_env="THE_TOKEN", **{"retries": 0, **options})


HEAD = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}


def ask(server: Server, body: Any, headers: dict[str, str] = HEAD, path: str = "/v1/score") -> tuple[int, Any]:
    """Status and JSON of one request, without the client under test."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def request(**changes: Any) -> dict[str, Any]:
    """Two points, with changes."""
    points = [base64.b64encode(struct.pack("<2f", *point)).decode() for point in ((1, 2), (3, 5))]
    return {"encoding": "float32", "shape": [2], "samples": points, "contexts": ["a", None], **changes}


# what is right


@pytest.mark.parametrize(("encoding", "tolerance"), [("float32", 1e-6), ("float16", 2e-4), ("png", 2e-3)])
def test_a_round_trip_gives_the_local_reward(server: Server, encoding: str, tolerance: float) -> None:
    """float32 exactly; float16 carries 11 bits, png 8 bits of each value."""
    images = torch.rand(11, 3, 16, 12)
    reward = client(server, encoding=encoding, batch_size=4, concurrency=2)
    local = ColourfulnessReward()(images, [""] * 11).reward
    distant = reward(images, ["a prompt"] * 11).reward
    assert local.std() > 10 * tolerance
    assert (distant - local).abs().max().item() <= tolerance
    assert (encoding == "float32") == torch.equal(distant, local)


def test_fifty_clients_at_once(probe: Server) -> None:
    """Each gets its own answer; the reward is called by one at a time."""
    samples = torch.randn(50, 6, 5)
    reward = client(probe, timeout=60.0)
    with ThreadPoolExecutor(50) as pool:
        outputs = list(pool.map(lambda i: reward(samples[i], [i] * 6), range(50)))
    for sample, output in zip(samples, outputs):
        assert output.reward.tolist() == pytest.approx((2 * sample.mean(1)).tolist(), abs=1e-6)
        assert output.components["alone"].tolist() == [1] * 6


def test_health_while_the_reward_runs(probe: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client(probe), torch.ones(1, 2), [f"wait:{tmp_path}"])
        wait_until((tmp_path / "running").exists)
        try:
            for path, known in (("/health", True), ("/v1/health", False)):
                status, reply = ask(probe, None, {}, path)
                assert status == (200 if known else 404)
                assert not known or reply == {"reward": "probes:probe", "version": flowrl.__version__}
            assert not answer.done()
        finally:
            (tmp_path / "go on").touch()
        assert answer.result().reward.tolist() == [2]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_a_signal_lets_running_requests_end(program_environment: dict[str, str], tmp_path: Path) -> None:
    with serving(tmp_path, program_environment, "--reward", "probes:probe") as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client(server), torch.ones(1, 2), [f"wait:{tmp_path}"])
        wait_until((tmp_path / "running").exists)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not listens(server.port))
        (tmp_path / "go on").touch()
        assert answer.result().reward.tolist() == [1]
        assert server.process.wait(timeout=60) == 0
        assert server.process.stdout is not None
        assert server.process.stdout.read() == "stopped\n"
        assert "Traceback" not in server.log.read_text()


def test_an_environment_keeps_the_address_and_not_the_token(server: Server) -> None:
    """What config.json says of an environment is its `origin`."""
    options = (f"remote.url={server.url}", "remote.token_env=THE_TOKEN", "remote.batch_size=3")
    env = flowrl.make("sd3-compress", flow="mini-sd3", reward="remote", reward_options=options)
    assert f"reward: remote, scored by {server.url}/v1/score" in env.describe()
    images = torch.rand(4, *env.sample_shape)
    output = env.evaluate(images, torch.arange(4))
    assert output.reward.tolist() == pytest.approx(ColourfulnessReward()(images, [""] * 4).reward.tolist(), abs=2e-3)
    assert server.url in json.dumps(env.origin)
    assert TOKEN not in json.dumps(env.origin)


# what is refused


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Bearer \xff"]
)
def test_no_token_no_score(server: Server, given: str | None) -> None:
    """Refused on the headers alone: of the body nothing is ever sent."""
    head = "POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 900000\r\n"
    head += "" if given is None else f"Authorization: {given}\r\n"
    status, reply = raw(server, f"{head}\r\n".encode("latin-1"))
    assert (status, reply["error"]) == (401, "The bearer token is missing or wrong.")


def raw(server: Server, data: bytes) -> tuple[int, Any]:
    """Status and JSON of the answer to these bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(data)
        response = http.client.HTTPResponse(sock)
        response.begin()
        return response.status, json.loads(response.read())


def test_a_wrong_token_is_said_to_the_client(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server closes the connection on a body, 17 MB here, that the client is still sending."""
    monkeypatch.setenv("THE_TOKEN", "another-token")
    with pytest.raises(RewardError, match=r"status 401.*remote\.token_env=NAME"):
        client(server, encoding="float32")(torch.zeros(4, 3, 512, 512), [""] * 4)


def test_a_body_too_long_by_its_own_word(server: Server) -> None:
    """Refused before it is sent."""
    head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "x", **HEAD, "Content-Length": "1000001"}.items())
    status, reply = raw(server, f"POST /v1/score HTTP/1.1\r\n{head}\r\n".encode())
    assert (status, reply["error"]) == (413, "The body has more than 1000000 bytes.")


@pytest.mark.parametrize(("n_chunks", "expected"), [(99, 400), (101, 413)])
def test_a_body_in_chunks_is_counted(server: Server, n_chunks: int, expected: int) -> None:
    """It says no length. The last chunk is left open where the server must have answered before."""
    head = "".join(f"{name}: {value}\r\n" for name, value in {**HEAD, "Transfer-Encoding": "chunked"}.items())
    data = f"POST /v1/score HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode()
    data += n_chunks * (b"2710\r\n" + 10_000 * b" " + b"\r\n")
    data += b"0\r\n\r\n" if expected == 400 else b""
    assert raw(server, data)[0] == expected


def test_too_many_samples(server: Server) -> None:
    with pytest.raises(RewardError, match=r"status 400.*1 to 8 samples, not 9"):
        client(server)(torch.rand(9, 3, 4, 4), [""] * 9)
    assert client(server, batch_size=8)(torch.rand(9, 3, 4, 4), [""] * 9).reward.shape == (9,)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type(server: Server, kind: str) -> None:
    status, reply = ask(server, json.dumps(request()), {**HEAD, "Content-Type": kind})
    assert (status, reply["error"]) == (415, "The Content-Type must be application/json.")


def test_other_paths_and_methods(server: Server) -> None:
    for path, body, expected in (("/", None, 404), ("/docs", None, 404), ("/openapi.json", None, 404)):
        assert ask(server, body, HEAD, path)[0] == expected
    assert ask(server, None)[0] == 405
    assert ask(server, "{}", HEAD, "/health")[0] == 405


@pytest.mark.parametrize(
    ("context", "raised"), [("raise", "KeyError"), ("nan", "RewardError"), ("short", "RewardError")]
)
def test_a_reward_that_fails(probe: Server, context: str, raised: str) -> None:
    """The reply has the class and a request id, the log the rest."""
    status, reply = ask(probe, json.dumps(request(contexts=[context, ""])))
    assert status == 500
    assert reply["error"] == f"The reward raised {raised}."
    log = probe.log.read_text().partition(reply["request_id"])[2]
    assert "Traceback" in log
    assert ("/a/path of the reward" in log) == (context == "raise")
    with pytest.raises(RewardError, match=f"status 500, 'The reward raised {raised}.' .request "):
        client(probe)(torch.ones(2, 2), [context, ""])
    assert client(probe)(torch.ones(2, 2), ["", ""]).reward.tolist() == [2, 2]


def png(width: int = 8, height: int = 8, *, mode: str = "RGB", file: str = "PNG") -> str:
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, format=file)
    return base64.b64encode(stream.getvalue()).decode()


def bomb(width: int, height: int) -> str:
    """A PNG file of few bytes that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    )
    return base64.b64encode(data).decode()


def two_headed(first: int, second: int) -> str:
    """A PNG file with two headers, of which Pillow follows the second."""
    one, other = (base64.b64decode(bomb(size, size)) for size in (first, second))
    return base64.b64encode(one[:33] + other[8:]).decode()


def images(*samples: str, shape: tuple[int, ...] = (3, 8, 8)) -> dict[str, Any]:
    return request(encoding="png", shape=list(shape), samples=list(samples), contexts=[""] * len(samples))


POINT = base64.b64encode(struct.pack("<2f", 1, 2)).decode()
INFINITE = base64.b64encode(struct.pack("<2f", 1, float("inf"))).decode()
REFUSED = [
    (images(bomb(50_000, 50_000)), r"samples\[0\] is a PNG of 50000x50000 pixels"),
    (images(png(), bomb(50_000, 50_000)), r"samples\[1\] is a PNG of 50000x50000 pixels"),
    (images(bomb(50_000, 50_000), shape=(3, 50_000, 50_000)), "more than 268435456 numbers"),
    (images(bomb(8, 8)[:60], shape=(3, 8, 8)), "damaged PNG"),
    (images(two_headed(8, 12_000)), r"samples\[0\] is a damaged PNG"),
    (images(two_headed(8, 9)), r"samples\[0\] is a damaged PNG"),
    (images(two_headed(8, 50_000)), r"samples\[0\] is a damaged PNG"),
    (images(png(8, 9)), "PNG of 8x9 pixels"),
    (images(png(), png(9, 8)), r"samples\[1\] is a PNG of 9x8 pixels"),
    (images(png(mode="L")), "colour type 0"),
    (images(png(mode="RGBA")), "colour type 6"),
    (images(png(mode="I;16")), "bit depth 16"),
    (images(png(file="JPEG")), "no PNG file"),
    (images(png(file="BMP")), "no PNG file"),
    (images("iVBO"), "no PNG file"),
    (images(png(), shape=(8, 8)), r"\[3, height, width\], not \[8, 8\]"),
    (images(png(), shape=(1, 8, 8)), r"\[3, height, width\], not \[1, 8, 8\]"),
    (request(samples=["not base64!", POINT]), r"samples\[0\] is not base64"),
    (request(samples=[POINT, "ä"]), r"samples\[1\] is not base64"),
    (request(samples=[POINT, POINT[:-1]]), r"samples\[1\] is not base64"),
    (request(samples=[POINT, 7]), r"samples\[1\] is not base64"),
    (request(shape=[3]), r"samples\[0\] has 8 bytes; shape \[3\] in float32 has 12"),
    (request(encoding="float16"), r"has 8 bytes; shape \[2\] in float16 has 4"),
    (request(samples=[POINT, POINT + POINT[:4]]), r"samples\[1\] is not base64|samples\[1\] has"),
    (request(samples=[POINT, INFINITE]), "must be finite"),
    (request(shape=[2.0]), "positive integers"),
    (request(shape=[True, 2]), "positive integers"),
    (request(shape=[-1, -2]), "positive integers"),
    (request(shape=[0]), "positive integers"),
    (request(shape=[]), "positive integers"),
    (request(shape=[1] * 8 + [2]), "1 to 8 positive integers"),
    (request(shape=2), "positive integers"),
    (request(shape=[2**40, 2**40]), "more than 268435456 numbers"),
    (request(encoding="pickle"), "encoding must be one of png, float16, float32, not 'pickle'"),
    (request(encoding=["png"]), "encoding must be one of"),
    (request(samples=[], contexts=[]), "1 to 8 samples, not 0"),
    (request(contexts=["a"]), "lists of the same length"),
    (request(samples=POINT), "lists of the same length"),
    (request(contexts=["a", {"b": 1}]), "string, a finite number or null"),
    (request(contexts=["a", True]), "string, a finite number or null"),
    (request(extra=1), "Unknown field 'extra'"),
    ({"samples": []}, "Missing fields: contexts, encoding, shape"),
    ([], "not a JSON object"),
]


@pytest.mark.parametrize(("sent", "message"), REFUSED)
def test_requests_of_another_form(sent: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        wire.decode_request(json.dumps(sent).encode(), 8)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"shape": ' + b"9" * 5000 + b"}"])
def test_bodies_that_are_no_json(body: bytes) -> None:
    with pytest.raises(RewardError, match="not JSON"):
        wire.decode_request(body, 8)


@pytest.mark.parametrize("body", [b"[" + b"[]," * 10**6 + b"[]]", b'{"a":' * 500_001])
def test_bodies_that_grow_in_memory(body: bytes) -> None:
    """Python takes 64 bytes for an empty list that is three bytes of text."""
    with pytest.raises(RewardError, match="more than 1000000 brackets"):
        wire.decode_request(body, 8)


def test_what_nobody_thought_of_gives_no_traceback() -> None:
    """A mistake of the server's own: the reply is an error like the others, and the log has the rest."""
    service = Service(
        ServedReward("x", lambda samples, contexts: None, torch.device("cpu")), "", max_batch=1, max_body=100
    )
    service._decoded = None  # type: ignore[assignment,method-assign]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/score", "query_string": b"", "http_version": "1.1"}
    head = [(b"content-type", b"application/json")]
    with pytest.raises(TypeError):  # for the log
        asyncio.run(application(service)({**scope, "headers": head}, receive, send))
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"] == "The server failed."


def test_infinite_contexts_are_no_json() -> None:
    for number in ("NaN", "1e999"):
        body = json.dumps(request()).replace('"a"', number).encode()
        with pytest.raises(RewardError, match="finite number"):
            wire.decode_request(body, 8)


@pytest.mark.parametrize("sent", [REFUSED[0][0], REFUSED[14][0], REFUSED[18][0], request(extra=1), []])
def test_they_are_refused_over_http_too(server: Server, sent: Any) -> None:
    status, reply = ask(server, json.dumps(sent))
    assert status == 400
    assert reply.keys() == {"error", "request_id"}
    assert "Traceback" not in reply["error"]


# the command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--reward must be given"),
        (["--reward", "colourfulnes"], "Did you mean 'colourfulness'"),
        (["--reward", "no_such_module:reward"], "no_such_module"),
        (["--reward", "compress", "--reward-options", "compress.qualty=3"], "Did you mean 'quality'"),
        (["--reward", "compress", "--reward-options", "count.quality=3"], "reward to give options to 'count'"),
        (["--reward", "compress", "--device", "warp"], "'warp'"),
        (["--reward", "compress", "--port", "70000"], "--port must be 0 to 65535"),
        (["--reward", "compress", "--max-batch", "0"], "--max-batch must be positive"),
        (["--reward", "compress", "--max-body-mb", "nan"], "--max-body-mb must be positive"),
        (["--reward", "compress", "--token-env", "UNSET_HERE"], "UNSET_HERE, which holds the token"),
        (["--reward", "compress", "--no-token", "--host", "0.0.0.0"], "--no-token serves on a loopback host only"),
        (["--reward", "compress", "--no-token", "--host", "host.example"], "--no-token serves on a loopback host only"),
        (["--reward", "compress", "--hots", "x"], "--host"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    monkeypatch.setenv("FLOWRL_REWARD_TOKEN", TOKEN)
    monkeypatch.setenv("COLUMNS", "300")
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert "Traceback" not in printed.err
    assert TOKEN not in printed.err + printed.out


def test_no_token_anywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Unset and empty alike: it does not start, and says how it would."""
    for value in (None, "", "  "):
        monkeypatch.delenv("FLOWRL_REWARD_TOKEN", raising=False)
        if value is not None:
            monkeypatch.setenv("FLOWRL_REWARD_TOKEN", value)
        assert main(["--reward", "compress"]) == 2
        assert "export FLOWRL_REWARD_TOKEN=" in capsys.readouterr().err


def test_a_port_that_is_taken(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--reward", "compress", "--no-token", "--port", str(server.port)]) == 2
    assert f"error: Cannot listen on 127.0.0.1, port {server.port}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["groupwise", "pairwise"])
def test_rewards_that_compare_samples_are_not_served(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A request holds a part of a group: ranks within the parts would be taken for those within the group."""

    def ranked(samples: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return samples.flatten(1).mean(1).argsort().argsort().float()

    setattr(ranked, kind, True)
    monkeypatch.setitem(REWARDS, "ranked", None)
    flowrl.register_reward("ranked")(ranked)
    assert main(["--reward", "ranked", "--no-token"]) == 2
    told = "The reward 'ranked' compares samples of the same prompt, and cannot be served"
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["--reward", "compress", "--no-token"]) == 2
    assert f"needs {missing}: pip install 'flowrl-torch[server]'" in capsys.readouterr().err


def test_help_lists_rewards(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for expected in ("--max-body-mb", "--no-token", "colourfulness", "remote"):
        assert expected in printed
    assert "--no-no-token" not in printed
