"""The reward `remote` against servers that behave and that do not; the wire format written and read again."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image

import flowrl
from flowrl.envs.base import GenerationEnv
from flowrl.envs.registration import CustomEnv
from flowrl.envs.rewards import make_reward, remote, wire
from flowrl.envs.rewards.catalogue import REWARDS
from flowrl.envs.rewards.remote import RemoteReward
from flowrl.errors import ConfigError, RewardError
from flowrl.models.loading import source_of
from flowrl.types import RewardOutput

Script = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Records the request, then does what the server's script says."""

    server: LocalServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.seen.append((self.path, self.headers, json.loads(body)))
            step = min(len(self.server.seen), len(self.server.script)) - 1
        self.server.script[step](self, json.loads(body))

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Not into the tests' output."""


class LocalServer(ThreadingHTTPServer):
    """Answers its n-th request by `script[n]`, all further ones by the last."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.seen: list[tuple[str, Any, dict[str, Any]]] = []
        self.script: list[Script] = [means]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args: Any) -> None:
        """A client that has gone away is part of some tests."""


def decoded(sample: str, dtype: str = "<f4") -> np.ndarray:
    """Read without the module under test."""
    return np.frombuffer(base64.b64decode(sample), dtype)


def means(handler: Handler, request: dict[str, Any]) -> None:
    """The mean of each sample, and twice that as a component."""
    reward = [float(decoded(sample).mean()) for sample in request["samples"]]
    twice = [2 * value for value in reward]
    handler.reply(200, json.dumps({"reward": reward, "components": {"twice": twice}}).encode())


def answer(status: int, body: bytes | str = b"", **headers: str) -> Script:
    raw = body.encode() if isinstance(body, str) else body
    return lambda handler, request: handler.reply(status, raw, **headers)


def hang_up(handler: Handler, request: dict[str, Any]) -> None:
    """Close without an answer."""
    handler.close_connection = True


def break_off(handler: Handler, request: dict[str, Any]) -> None:
    """Promise more than comes."""
    handler.reply(200, b'{"reward": [', **{"Content-Length": "1000"})
    handler.close_connection = True


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between attempts, recorded and not waited for."""
    seconds: list[float] = []

    def pause(wait: float, stop: threading.Event) -> bool:
        seconds.append(wait)
        return stop.is_set()

    monkeypatch.setattr(remote, "_pause", pause)
    return seconds


def points(n: int) -> torch.Tensor:
    return torch.randn(n, 2)


def score(server: LocalServer, n: int = 3, **options: Any) -> RewardOutput:
    return RemoteReward(server.url, **options)(points(n), [None] * n)


# the format


def test_what_is_sent(server: LocalServer) -> None:
    """Read by numpy and Pillow alone: the format as it is documented."""
    contexts = ["ein Käfer", None, 3, 0.5, np.int64(7)]
    server.script = [answer(200, '{"reward": [1, 2, 3, 4, 5]}')]
    for encoding, dtype in (("float32", "<f4"), ("float16", "<f2")):
        samples = torch.randn(5, 2, 3)
        RemoteReward(server.url, encoding=encoding)(samples, contexts)
        path, headers, request = server.seen[-1]
        assert path == "/v1/score"
        assert headers["Content-Type"] == "application/json"
        assert headers["Authorization"] is None
        assert request.keys() == {"encoding", "shape", "samples", "contexts"}
        assert (request["encoding"], request["shape"]) == (encoding, [2, 3])
        assert request["contexts"] == ["ein Käfer", None, 3, 0.5, 7]
        for text, sample in zip(request["samples"], samples):
            assert np.array_equal(decoded(text, dtype), sample.numpy().astype(dtype).ravel())


def test_images_are_sent_as_png(server: LocalServer) -> None:
    server.script = [answer(200, '{"reward": [1, 2]}')]
    images = torch.rand(2, 3, 5, 7)
    RemoteReward(server.url + "/")(images, ["a", "b"])
    path, _, request = server.seen[0]
    assert path == "/v1/score"
    assert (request["encoding"], request["shape"]) == ("png", [3, 5, 7])
    for text, image in zip(request["samples"], images):
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (7, 5))
            expected = np.rint(255 * image.permute(1, 2, 0).numpy())
            assert np.array_equal(np.asarray(picture), expected)


@pytest.mark.parametrize(("encoding", "tolerance"), [("png", 0.5 / 255 + 1e-6), ("float16", 2**-12), ("float32", 0)])
def test_written_and_read_again(encoding: str, tolerance: float) -> None:
    images = torch.rand(3, 3, 6, 4)
    again, contexts = wire.decode_request(wire.encode_request(images, ["a", None, 2.5], encoding), 3)
    assert contexts == ["a", None, 2.5]
    assert (again - images).abs().max().item() <= tolerance
    output = RewardOutput(torch.randn(3), {"part": torch.randn(3)})
    reply = wire.decode_reply(wire.encode_reply(output), 3)
    assert torch.equal(reply.reward, output.reward)
    assert torch.equal(reply.components["part"], output.components["part"])


def test_the_documented_examples() -> None:
    """The page's request, reply and error, in this order."""
    page = (REPOSITORY / "docs" / "remote-rewards.md").read_text(encoding="utf-8")
    request, reply, error = (block.encode() for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    samples, contexts = wire.decode_request(request, 2)
    assert (samples.tolist(), contexts) == ([[1, 2], [3, 5]], ["a prompt", None])
    assert wire.decode_reply(reply, 2).reward.tolist() == [1.5, 4]
    assert wire.decode_error(error) == "'samples[0] is not base64.' (request '4513464d168f4771859c85eaf76a774f')"


@pytest.mark.parametrize("name", ["", "two\nlines", "\x1b]0;title\x07", "a\x00b", "n" * 101])
def test_names_of_components_are_shown_as_they_are(name: str) -> None:
    """They come from another machine, and go to the terminal."""
    body = json.dumps({"reward": [1.0], "components": {name: [1.0]}}).encode()
    with pytest.raises(RewardError, match="1 to 100 printable characters") as raised:
        wire.decode_reply(body, 1)
    assert str(raised.value).isprintable()
    for fine in ("Güte", "n" * 100, "a/b c"):
        assert fine in wire.decode_reply(json.dumps({"reward": [1], "components": {fine: [1]}}).encode(), 1).components


@pytest.mark.parametrize(
    ("samples", "encoding", "message"),
    [
        (torch.full((1, 3, 4, 4), 1.1), "png", r"values in \[0, 1\]; these go from 1.1 to 1.1"),
        (torch.full((1, 3, 4, 4), torch.nan), "png", r"values in \[0, 1\]"),
        (torch.zeros(1, 2), "png", r"Only images \(B, 3, H, W\)"),
        (torch.full((1, 2), 1e5), "float16", "not finite as float16"),
        (torch.full((1, 2), torch.nan), "float32", "not finite as float32"),
    ],
)
def test_samples_that_cannot_be_sent(server: LocalServer, samples: torch.Tensor, encoding: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        RemoteReward(server.url, encoding=encoding)(samples, [None])
    assert server.seen == []


@pytest.mark.parametrize("context", [["a"], {"prompt": "a"}, True, float("nan"), b"a"])
def test_contexts_that_cannot_be_sent(server: LocalServer, context: Any) -> None:
    with pytest.raises(RewardError, match="string, a finite number or null"):
        RemoteReward(server.url)(points(1), [context])
    assert server.seen == []


def test_one_context_per_sample(server: LocalServer) -> None:
    with pytest.raises(RewardError, match="3 samples came with 4 contexts"):
        RemoteReward(server.url)(points(3), [None] * 4)


# replies


def test_batches_side_by_side_keep_their_order(server: LocalServer) -> None:
    """The first batch is answered last: only when all others have been."""
    others = threading.Semaphore(0)

    def first_last(handler: Handler, request: dict[str, Any]) -> None:
        if request["contexts"][0] == 0:
            for _ in range(7):
                assert others.acquire(timeout=20)
        means(handler, request)
        others.release()

    server.script = [first_last]
    samples = torch.randn(30, 2)
    reward = RemoteReward(server.url, batch_size=4, concurrency=3)
    output = reward(samples, list(range(30)))
    assert output.reward.tolist() == pytest.approx(samples.mean(1).tolist(), abs=1e-6)
    assert torch.equal(output.components["twice"], 2 * output.reward)
    assert sorted(len(request["samples"]) for _, _, request in server.seen) == [2, 4, 4, 4, 4, 4, 4, 4]
    for _, _, request in server.seen:
        first = request["contexts"][0]
        assert request["contexts"] == list(range(first, min(first + 4, 30)))


def test_never_more_requests_than_concurrency(server: LocalServer) -> None:
    running, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3)

    def count(handler: Handler, request: dict[str, Any]) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(timeout=20)  # three are there at once, or this test fails
        with lock:
            running -= 1
        means(handler, request)

    server.script = [count]
    score(server, 9, batch_size=1, concurrency=3)
    assert most == 3


PROPER = r"sent no proper reply for samples 0 to 2 of 3, the first of context None, at attempt 1: "


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2, 3]", "not a JSON object"),
        ("{}", "Missing fields: reward"),
        ('{"reward": [1, 2]}', "list of 3 numbers.* come as 2 entries"),
        ('{"reward": [1, 2, 3, 4]}', "come as 4 entries"),
        ('{"reward": 1}', "come as 1"),
        ('{"reward": [1, NaN, 3]}', "reward is nan for sample 1"),
        ('{"reward": [1, 2, -Infinity]}', "reward is -inf for sample 2"),
        ('{"reward": [1, 1e39, 3]}', r"reward is 1e\+39 for sample 1"),
        ('{"reward": [1, "2", 3]}', "reward is '2' for sample 1"),
        ('{"reward": [1, true, 3]}', "reward is True for sample 1"),
        ('{"reward": [1, null, 3]}', "reward is None for sample 1"),
        ('{"reward": [1, 2, 3], "components": {"a": [1]}}', "component 'a' must be a list of 3 numbers"),
        ('{"reward": [1, 2, 3], "components": {"a": [1, 2, NaN]}}', "component 'a' is nan for sample 2"),
        ('{"reward": [1, 2, 3], "components": []}', "components must be an object"),
        ('{"reward": [1, 2, 3], "scores": []}', "Unknown field 'scores'. Known: components, reward"),
    ],
)
def test_no_proper_reply(server: LocalServer, waits: list[float], body: str, message: str) -> None:
    """Stops the run at once, with the address: asking again would not help."""
    server.script = [answer(200, body)]
    with pytest.raises(RewardError, match=PROPER + f".*{message}") as raised:
        score(server)
    assert server.url in str(raised.value)
    assert len(server.seen) == 1
    assert waits == []


def test_a_reply_too_long_is_not_read(server: LocalServer) -> None:
    server.script = [answer(200, b" " * (remote.MAX_REPLY + 1))]
    with pytest.raises(RewardError, match=f"more than {remote.MAX_REPLY} bytes"):
        score(server)
    assert len(server.seen) == 1
    server.script = [answer(200, b'{"reward": [1, 2, 3]}'.ljust(remote.MAX_REPLY))]
    assert score(server).reward.tolist() == [1, 2, 3]


def test_components_that_change(server: LocalServer) -> None:
    server.script = [answer(200, '{"reward": [1]}'), answer(200, '{"reward": [1], "components": {"a": [1]}}')]
    with pytest.raises(RewardError, match=r"\[\] for one batch and \['a'\] for another"):
        score(server, 2, batch_size=1, concurrency=1)


# trying again


@pytest.mark.parametrize("failure", [answer(500), answer(503, "busy"), answer(429), hang_up, break_off])
def test_what_may_pass_is_tried_again(server: LocalServer, waits: list[float], failure: Script) -> None:
    server.script = [failure, failure, means]
    assert score(server).reward.shape == (3,)
    assert len(server.seen) == 3
    assert server.seen[0][2] == server.seen[1][2] == server.seen[2][2]
    assert 0.25 <= waits[0] <= 0.5
    assert 0.5 <= waits[1] <= 1.0


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (answer(500, '{"error": "the reward raised\\nKeyError", "request_id": "ab12"}'), r"raised\\nKeyError.*ab12"),
        (answer(502, "<html>\x1b[31m"), r"status 502, '<html>\\x1b\[31m'"),
        (hang_up, "RemoteDisconnected"),
        (break_off, "IncompleteRead"),
    ],
)
def test_attempts_come_to_an_end(server: LocalServer, waits: list[float], failure: Script, message: str) -> None:
    server.script = [failure]
    with pytest.raises(RewardError, match=rf"for samples 0 to 2 of 3.*{message}.* at the last of 4 attempts") as raised:
        score(server, retries=3)
    assert len(server.seen) == 4
    assert len(waits) == 3
    assert server.url in str(raised.value)


def test_waits_are_bounded(server: LocalServer, waits: list[float]) -> None:
    server.script = [answer(500)]
    with pytest.raises(RewardError, match="21 attempts"):
        score(server, retries=20)
    assert max(waits) <= remote.LONGEST_WAIT
    assert all(wait >= min(0.25 * 2**k, remote.LONGEST_WAIT / 2) for k, wait in enumerate(waits))


def test_retry_after(server: LocalServer, waits: list[float]) -> None:
    """In seconds, as a date, and without sense."""
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=90), usegmt=True)
    server.script = [
        *(answer(429, Retry_After=value) for value in ("7", date, "Thu, 01 Jan 1970 00:00:00 GMT", "soon")),
        answer(429, Retry_After=f"Thu, 01 Jan {10**20} 00:00:00 GMT"),
        means,
    ]
    score(server, retries=5)
    assert waits[0] == 7
    assert 60 < waits[1] <= 90
    assert waits[2] == 0
    assert 2 <= waits[3] <= 4  # its own wait before the fourth retry
    assert 4 <= waits[4] <= 8


def test_a_retry_after_too_long(server: LocalServer, waits: list[float]) -> None:
    server.script = [answer(503, Retry_After="3600")]
    with pytest.raises(RewardError, match="asked to wait 3600 s, which is more than 300, at the last of 1 attempts"):
        score(server)
    assert waits == []


def test_a_server_that_is_too_slow(server: LocalServer, waits: list[float]) -> None:
    """Silence, and an answer that trickles: each byte within the time, all together not."""
    go_on = threading.Event()

    def silent(handler: Handler, request: dict[str, Any]) -> None:
        go_on.wait(20)

    def trickle(handler: Handler, request: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not go_on.wait(0.05):
            handler.wfile.write(b" ")

    try:
        for script in (silent, trickle):
            server.script = [script]
            with pytest.raises(RewardError, match=r"TimeoutError.*2 attempts"):
                score(server, timeout=0.3, retries=1)
    finally:
        go_on.set()
    assert len(server.seen) == 4


def test_an_answer_that_begins_late_has_only_the_rest_of_the_time(server: LocalServer, waits: list[float]) -> None:
    go_on = threading.Event()

    def late(handler: Handler, request: dict[str, Any]) -> None:
        go_on.wait(1.2)
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        go_on.wait(20)

    server.script = [late]
    begun = time.monotonic()
    try:
        with pytest.raises(RewardError, match="TimeoutError: timed out, at the last of 1 attempts"):
            score(server, timeout=1.5, retries=0)
    finally:
        go_on.set()
    assert 1.4 < time.monotonic() - begun < 2.4  # and not 2.7


def test_a_connection_that_is_closed_with_the_last_byte(server: LocalServer, waits: list[float]) -> None:
    """The reply is whole by its announced length, whatever becomes of the connection then; also in many pieces."""

    def close_at_once(handler: Handler, request: dict[str, Any]) -> None:
        body = json.dumps({"reward": [1, 2, 3]}).encode().ljust(300_000)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        for start in range(0, len(body), 50_000):
            handler.wfile.write(body[start : start + 50_000])
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True

    server.script = [close_at_once]
    assert score(server).reward.tolist() == [1, 2, 3]
    assert len(server.seen) == 1
    assert waits == []


def test_a_reply_without_a_length_ends_with_the_connection(server: LocalServer) -> None:
    def until_closed(handler: Handler, request: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b'{"reward": [1, 2, 3]}')
        handler.close_connection = True

    server.script = [until_closed]
    assert score(server).reward.tolist() == [1, 2, 3]


def test_nothing_is_unpacked(server: LocalServer) -> None:
    """A small reply that unpacks to a huge one is taken as the bytes that it is."""
    server.script = [answer(200, gzip.compress(b'{"reward": [1, 2, 3]}'), Content_Encoding="gzip")]
    with pytest.raises(RewardError, match="The body is not JSON"):
        score(server)
    assert server.seen[0][1]["Accept-Encoding"] == "identity"


def test_the_environment_gives_no_proxy_and_no_credentials(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with LocalServer() as closed:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, closed.url)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    score(server, retries=0)
    assert server.seen[0][1]["Authorization"] is None


def test_certificates_are_checked(server: LocalServer, waits: list[float]) -> None:
    context = remote._tls()
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    with pytest.raises(RewardError, match="SSLError"):  # this server speaks no TLS
        RemoteReward(server.url.replace("http:", "https:"), retries=0)(points(1), [None])
    assert server.seen == []


def test_nobody_listens(waits: list[float]) -> None:
    with LocalServer() as closed:
        url = closed.url
    with pytest.raises(RewardError, match=r"ConnectionRefusedError.* 3 attempts.*Check that it runs"):
        RemoteReward(url, retries=2)(points(1), [None])
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "'no such thing'"),
        (401, r"remote\.token_env=NAME"),
        (403, r"remote\.token_env=NAME"),
        (404, "without /v1/score"),
        (413, r"Lower remote\.batch_size"),
        (204, "docs/remote-rewards.md"),
        (307, "a redirect to 'http://elsewhere.example/'.*Redirects are not followed"),
    ],
)
def test_what_is_never_tried_again(server: LocalServer, waits: list[float], status: int, message: str) -> None:
    body = '{"error": "no such thing", "request_id": "1"}' if status == 400 else ""
    server.script = [answer(status, body, Location="http://elsewhere.example/")]
    with pytest.raises(RewardError, match=rf"answered with status {status}.*{message}"):
        score(server)
    assert len(server.seen) == 1
    assert waits == []


def test_one_failure_ends_the_other_batches(server: LocalServer) -> None:
    """Batches that wait for their next attempt, or have not begun, are given up."""
    refused = threading.Event()

    def script(handler: Handler, request: dict[str, Any]) -> None:
        if request["contexts"][0] == 0:
            handler.reply(503, b"", **{"Retry-After": "300"})
            refused.set()
        else:
            assert refused.wait(20)
            handler.reply(400, b"")

    server.script = [script]
    with pytest.raises(RewardError, match="status 400"):  # and not after 300 seconds
        RemoteReward(server.url, batch_size=1, concurrency=2)(points(20), list(range(20)))
    assert len(server.seen) < 20


def test_random_numbers_stay_as_seeded(server: LocalServer, waits: list[float]) -> None:
    samples = points(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    server.script = [answer(500), means]
    RemoteReward(server.url)(samples, [None] * 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


# token and options


def test_the_token_comes_from_the_environment(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", " s3cret-token\n")
    reward = make_reward("remote", {"url": server.url, "token_env": "MY_TOKEN"})
    reward(points(1), [None])
    assert server.seen[0][1]["Authorization"] == "Bearer s3cret-token"
    assert "s3cret" not in f"{reward} {reward.description} {REWARDS['remote']}"


def test_a_file_has_no_other_secret_sent(server: LocalServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A checkpoint of somebody else could name any variable, and an address of theirs; one of one's own is free."""
    settings = {"flow": "mini-sd3", "reward": "remote", "prompts": ("a star",)}
    for variable in ("AWS_SECRET", "FLOWRL_REWARD_TOKEN"):
        monkeypatch.setenv(variable, "s3cret-token")
        options = (f"remote.url={server.url}", f"remote.token_env={variable}", "remote.encoding=png")
        small = {"n_samples": 2, "batch_size": 2, "group_size": 2, "rollout_steps": 2, "seed": 0, "device": "cpu"}
        env = flowrl.make("sd3-compress", **settings, reward_options=options)
        flowrl.ORWCFMW2("FlowPolicy", env, **small).save(tmp_path / variable)
    server.seen.clear()
    with pytest.raises(
        ConfigError, match=rf"config\.json' asks to send .*AWS_SECRET to {server.url}.*FLOWRL_TOKENS="
    ) as raised:
        flowrl.FlowAlgorithm.load(tmp_path / "AWS_SECRET", device="cpu")
    assert "s3cret" not in str(raised.value)
    assert not server.seen
    flowrl.FlowAlgorithm.load(tmp_path / "FLOWRL_REWARD_TOKEN", device="cpu")
    monkeypatch.setenv("FLOWRL_TOKENS", "OTHER,AWS_SECRET")
    flowrl.FlowAlgorithm.load(tmp_path / "AWS_SECRET", device="cpu")


def test_a_refused_token_is_not_repeated(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret-token")
    server.script = [answer(401)]
    with pytest.raises(RewardError, match="401") as raised:
        score(server, token_env="MY_TOKEN")
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"needs the address of its server: .*remote\.url=http://127"),
        ({"url": "127.0.0.1:8000"}, "must be an http or https address"),
        ({"url": "ftp://host"}, "must be an http or https address"),
        ({"url": "file:///etc/passwd"}, "must be an http or https address"),
        ({"url": "http://"}, "must be an http or https address"),
        ({"url": "http://host:99999"}, "must be an http or https address"),
        ({"url": "http://host/a b"}, "must be an http or https address"),
        ({"url": "http://host/\r\nX: y"}, "must be an http or https address"),
        ({"url": "http://me:s3cret@host"}, "no user, password, query or fragment"),
        ({"url": "http://host?token=s3cret"}, "no user, password, query or fragment"),
        ({"url": "http://host", "encoding": "jpeg"}, "encoding must be auto, png, float16 or float32: 'jpeg'"),
        ({"url": "http://host", "batch_size": 0}, "batch_size must be at least 1"),
        ({"url": "http://host", "concurrency": 0}, "concurrency must be 1 to 64"),
        ({"url": "http://host", "timeout": float("nan")}, "timeout must be a positive number"),
        ({"url": "http://host", "timeout": 0.0}, "timeout must be a positive number"),
        ({"url": "http://host", "retries": -1}, "retries must be 0 to 20"),
        ({"url": "http://host", "token_env": "UNSET_HERE"}, "UNSET_HERE, which is not set: export UNSET_HERE"),
        ({"url": "http://host", "token_env": "s3cret-token"}, "name of an environment variable, not the token"),
        ({"url": "http://host", "token_env": "BAD_TOKEN"}, "The token in BAD_TOKEN must be printable"),
    ],
)
def test_options_without_meaning(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAD_TOKEN", "s3cret\r\nX: y")
    with pytest.raises(ConfigError, match=message) as raised:
        RemoteReward(**options)
    assert "s3cret" not in str(raised.value)


def test_options_as_written_on_the_command_line() -> None:
    options = {"url": "http://h:81/p/", "batch_size": "2", "timeout": "1.5", "retries": "0", "concurrency": "3"}
    reward = make_reward("remote", options)
    assert reward.url == "http://h:81/p/v1/score"
    assert (reward.batch_size, reward.timeout, reward.retries, reward.concurrency) == (2, 1.5, 0, 3)


def test_in_an_environment(server: LocalServer) -> None:
    """The environment's own check comes on top; its message stays the reward's."""
    reward = RemoteReward(server.url)
    env: GenerationEnv = CustomEnv(source_of("gaussians"), [None], reward, "far", -1.0, 1.0)
    samples = points(4)
    output = env.evaluate(samples, torch.zeros(4, dtype=torch.long))
    assert output.reward.tolist() == pytest.approx(samples.mean(1).tolist(), abs=1e-6)
    server.script = [answer(400)]
    with pytest.raises(RewardError, match=r"^The reward server http"):
        env.evaluate(samples, torch.zeros(4, dtype=torch.long))
