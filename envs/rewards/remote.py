"""A reward computed by another process or machine, asked over HTTP."""

from __future__ import annotations

import math
import os
import random
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from flowrl.envs.rewards import wire
from flowrl.envs.rewards.catalogue import register_reward
from flowrl.errors import ConfigError, RewardError
from flowrl.registry import naming_file
from flowrl.types import RewardOutput

if TYPE_CHECKING:
    import httpx2

MAX_REPLY = 4 * 2**20  # bytes of a reply that are read at most
MAX_ERROR = 64 * 2**10  # bytes read of a reply that is an error
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before the first retry, doubled for each further one up to the second
LONGEST_RETRY_AFTER = 300.0  # seconds; a server that asks for a longer wait is given up

_JITTER = random.Random()  # of its own: training's random numbers stay as seeded


class _TransientError(Exception):
    """An attempt that failed in a way that may pass; `wait`: the seconds that the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@register_reward("remote")
class RemoteReward:
    """Scores of a server asked over HTTP: flowrl.serve, or any that speaks docs/remote-rewards.md.

    Connection errors, timeouts, 429 and 5xx are tried again; anything else that is no proper reply stops the run.

    Args:
        url: Address of the server, such as http://127.0.0.1:8000; "/v1/score" is appended.
        token_env: Name of the environment variable that holds the bearer token; None sends no token. The token
            itself is never an option, so that it comes neither into the process list nor into config.json.
        encoding: How samples are sent: "png" (images in [0, 1], rounded to 1/255), "float16" or "float32";
            "auto" is png for (B, 3, H, W) and float32 for any other shape.
        batch_size: Samples per request.
        concurrency: Requests at a time.
        timeout: Seconds to connect, and seconds to wait for the answer; one that trickles is given up at the first
            piece that comes later.
        retries: Attempts after the first, per request.

    Raises:
        ConfigError: An option without meaning, or a token that is not there.
    """

    on_host = True

    def __init__(
        self,
        url: str = "",
        token_env: str | None = None,
        encoding: str = "auto",
        batch_size: int = 16,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 4,
    ) -> None:
        _check_url(url)
        _require(encoding in ("auto", *wire.ENCODINGS), f"encoding must be auto, png, float16 or float32: {encoding!r}")
        _require(batch_size >= 1, "batch_size must be at least 1")
        _require(1 <= concurrency <= 64, "concurrency must be 1 to 64")
        _require(math.isfinite(timeout) and timeout > 0, "timeout must be a positive number of seconds")
        _require(0 <= retries <= 20, "retries must be 0 to 20")
        self.url = url.rstrip("/") + wire.SCORE_PATH
        self.encoding, self.batch_size, self.concurrency = encoding, batch_size, concurrency
        self.timeout, self.retries = timeout, retries
        self.description = f"remote, scored by {self.url}"
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",
            "User-Agent": "flowrl",
        }
        if token_env is not None:
            token = wire.read_token(token_env)
            _require(bool(token), f"token_env names the variable {token_env}, which is not set: export {token_env}=...")
            _check_sent(token_env, self.url)
            self._headers["Authorization"] = f"Bearer {token}"

    def __call__(self, samples: torch.Tensor, contexts: Sequence[Any]) -> RewardOutput:
        """Reward samples (B, *sample_shape), with the components that the server gives.

        Args:
            samples: On any device.
            contexts: B strings, numbers or None.

        Raises:
            RewardError: Samples or contexts that cannot be sent, or no proper reply; never a made-up score.
        """
        if len(contexts) != len(samples):
            raise RewardError(f"{len(samples)} samples came with {len(contexts)} contexts; there must be one for each.")
        stop = threading.Event()
        with self._client() as client, ThreadPoolExecutor(self.concurrency) as pool:
            ask = _Asking(client, stop)
            futures = [
                pool.submit(self._score, samples, contexts, start, ask)
                for start in range(0, len(samples), self.batch_size)
            ]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                stop.set()  # ends the waits between attempts
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._joined([future.result() for future in futures])

    def _client(self) -> httpx2.Client:
        """Open connections for one call: no proxies or credentials of the environment; redirects are not followed."""
        import httpx2

        return httpx2.Client(
            verify=_tls(),
            trust_env=False,
            follow_redirects=False,
            limits=httpx2.Limits(max_keepalive_connections=0),
        )

    def _score(self, samples: torch.Tensor, contexts: Sequence[Any], start: int, ask: _Asking) -> RewardOutput:
        """Ask for the reward of one batch, which begins at `start`."""
        end = min(start + self.batch_size, len(samples))
        encoding = self.encoding
        if encoding == "auto":
            encoding = "png" if samples.ndim == 4 and samples.shape[1] == 3 else "float32"
        body = wire.encode_request(samples[start:end], contexts[start:end], encoding)
        which = f"samples {start} to {end - 1} of {len(samples)}, the first of context {contexts[start]!r}"
        reply, attempts = self._ask(body, which, ask)
        try:
            return wire.decode_reply(reply, end - start)
        except RewardError as error:
            raise RewardError(
                f"The reward server {self.url} sent no proper reply for {which}, at attempt {attempts}: {error} "
                f"It began {reply[:80]!r}. The server must answer as docs/remote-rewards.md says."
            ) from error

    def _ask(self, body: bytes, which: str, ask: _Asking) -> tuple[bytes, int]:
        """Ask, and give the reply's body and how many attempts it took."""
        for attempt in range(1, self.retries + 2):
            try:
                return self._attempt(body, attempt, ask.client), attempt
            except _TransientError as error:
                reason, wait = str(error), error.wait
            if wait is None:
                wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * _JITTER.uniform(0.5, 1.0)
            elif wait > LONGEST_RETRY_AFTER:
                reason += f", and asked to wait {wait:g} s, which is more than {LONGEST_RETRY_AFTER:g}"
                break
            if attempt > self.retries or _pause(wait, ask.stop):
                break
        raise RewardError(
            f"The reward server {self.url} gave no score for {which}: {reason}, at the last of {attempt} attempts. "
            "Check that it runs and has this address; remote.timeout and remote.retries say how long to try."
        )

    def _attempt(self, body: bytes, attempt: int, client: httpx2.Client) -> bytes:
        """Ask once, and give the body of a reply of status 200.

        Raises:
            _TransientError: To be tried again.
            RewardError: Trying again would not help.
        """
        status, headers, reply = self._post(body, client)
        if status == 200 and len(reply) <= MAX_REPLY:
            return reply
        if status == 429 or status >= 500:
            said = f"status {status}, {wire.decode_error(reply)}"
            raise _TransientError(said, _retry_after(headers.get("Retry-After")))
        if status == 200:
            said, remedy = f"more than {MAX_REPLY} bytes", "Replies must be shorter."
        elif 300 <= status < 400:
            said = f"status {status}, a redirect to {headers.get('Location', '')[:200]!r}"
            remedy = "Redirects are not followed: give the final address as remote.url."
        else:
            said, remedy = f"status {status}, {wire.decode_error(reply)}", _REMEDIES.get(status, _REMEDIES[400])
        raise RewardError(f"The reward server {self.url} answered with {said}, at attempt {attempt}. {remedy}")

    def _post(self, body: bytes, client: httpx2.Client) -> tuple[int, Mapping[str, str], bytes]:
        """Send the request; give status, headers, and the body, cut at the most that is read.

        Raises:
            _TransientError: There is no whole answer within the time.
        """
        import httpx2

        waits = httpx2.Timeout(self.timeout).as_dict()
        deadline = math.inf

        def trace(event: str, info: dict[str, Any]) -> None:
            nonlocal deadline
            if event.endswith("receive_response_headers.started"):
                deadline = time.monotonic() + self.timeout

        # a server that refuses a request may answer and close before it has read all of it: the client reads on
        request = client.build_request(
            "POST", self.url, content=body, headers=self._headers, extensions={"timeout": waits, "trace": trace}
        )
        data, response = bytearray(), None
        try:
            response = client.send(request, stream=True)
            limit = MAX_REPLY if response.status_code == 200 else MAX_ERROR
            waits["read"] = max(deadline - time.monotonic(), 1e-3)
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > limit:
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
        except (OSError, httpx2.TransportError) as error:
            raise _TransientError(_reason(error, begun=response is not None)) from error
        finally:
            if response is not None:
                response.close()
        return response.status_code, response.headers, bytes(data)

    def _joined(self, outputs: list[RewardOutput]) -> RewardOutput:
        """Join batches to one."""
        names = outputs[0].components.keys()
        for output in outputs:
            if output.components.keys() != names:
                raise RewardError(
                    f"The reward server {self.url} gave the components {sorted(names)} for one batch and "
                    f"{sorted(output.components)} for another; they must be the same for all."
                )
        return RewardOutput(
            torch.cat([output.reward for output in outputs]),
            {name: torch.cat([output.components[name] for output in outputs]) for name in names},
        )


@dataclass(frozen=True)
class _Asking:
    """State that the requests of one call share: connections, and whether another one has failed."""

    client: httpx2.Client
    stop: threading.Event


_CHECK_TOKEN = "Give the variable that holds the server's token as --env.reward-options remote.token_env=NAME."
_REMEDIES = {
    400: "The request does not suit this server: see docs/remote-rewards.md for what is sent.",
    401: _CHECK_TOKEN,
    403: _CHECK_TOKEN,
    404: f"remote.url must be the address without {wire.SCORE_PATH}, of a server of docs/remote-rewards.md.",
    413: "Lower remote.batch_size, or send smaller samples: remote.encoding=png or float16.",
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"The reward option remote.{message}.")


def _check_url(url: str) -> None:
    """Raise `ConfigError` for anything but an http or https address that carries no secret."""
    example = "--env.reward-options remote.url=http://127.0.0.1:8000"
    if not url:
        raise ConfigError(f"The reward 'remote' needs the address of its server: {example}.")
    if set("@?#") & set(url):
        raise ConfigError(
            "remote.url must have no user, password, query or fragment: it is written into config.json. "
            "Put a token into an environment variable and name that: remote.token_env=NAME."
        )
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise ConfigError(f"remote.url must be an http or https address, not {url!r}; e.g. {example}.")


def _check_sent(variable: str, url: str) -> None:
    """Check that a variable may be sent to a server: a file of others could name any secret, and an address of theirs.

    Raises:
        ConfigError: A file names it, and it neither begins with FLOWRL_ nor stands in FLOWRL_TOKENS.
    """
    file, allowed = naming_file(), os.environ.get("FLOWRL_TOKENS", "").replace(",", " ").split()
    if file is not None and not variable.startswith("FLOWRL_") and variable not in allowed:
        raise ConfigError(
            f"{file} asks to send what is in the variable {variable} to {url}. Of variables that a file names, only "
            "those that begin with FLOWRL_ are sent as tokens. If the address is that of your server, allow this one "
            f"too: export FLOWRL_TOKENS={variable}."
        )


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """Make a context that checks certificates by the system's authorities (or those that SSL_CERT_FILE names)."""
    return ssl.create_default_context()


def _reason(error: Exception, begun: bool) -> str:
    """Say what failed, by the system's own error where there is one beneath those of the client.

    Args:
        error: As the client raised it.
        begun: Whether an answer had begun.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return f"{type(cause).__name__}: {cause}"
    if type(error).__name__ == "RemoteProtocolError":
        return f"{'IncompleteRead' if begun else 'RemoteDisconnected'}: {error}"
    return f"{type(error).__name__}: {error}"


def _retry_after(text: str | None) -> float | None:
    """Read the seconds to wait from a Retry-After header (seconds, or a date); None where it makes no sense."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if date.tzinfo is None:  # "-0000": UTC
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())


def _pause(seconds: float, stop: threading.Event) -> bool:
    """Wait; whether `stop` was set meanwhile."""
    return stop.wait(seconds)
