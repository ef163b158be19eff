"""Serve a reward over HTTP: `python -m flowrl.serve --reward colourfulness`, for `--env.reward remote` elsewhere.

docs/remote-rewards.md has the wire format, the limits and what to know of security.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import signal
import socket
import sys
import uuid
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro
from stable_baselines3.common.utils import get_device

from flowrl.config import FlowConfig
from flowrl.envs.base import check_reward
from flowrl.envs.rewards import REWARDS, make_reward, wire
from flowrl.envs.rewards.catalogue import RewardFunction, check_options, parse_options
from flowrl.errors import ConfigError, RewardError
from flowrl.runs.program import Device, OwnModules, guarded
from flowrl.training.construction import check_device
from flowrl.types import RewardOutput
from flowrl.version import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

PROGRAM = "python -m flowrl.serve"
AT_ONCE = 4  # requests whose bodies are in memory; further ones wait unread
CONNECTIONS = 512  # at once; further ones are told to come later (503)
BODY_SECONDS = 60.0  # for a body to arrive
STOP_SECONDS = 30  # for running requests to end after a signal

_LOG = logging.getLogger("flowrl.serve")


@dataclass(frozen=True)
class ServeConfig:
    """Serve a reward over HTTP, for runs with `--env.reward remote`."""

    reward: str = ""
    """Reward: a name from the list below, or module:name (the module registers it)."""
    reward_options: tuple[str, ...] = ()
    """Options of the reward, each as REWARD.OPTION=VALUE: aesthetic.head=FILE, compress.quality=80."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface of this machine."""
    port: int = 8000
    """Port to listen on; 0 takes a free one. The line printed at the start says which."""
    token_env: str = "FLOWRL_REWARD_TOKEN"
    """Environment variable that holds the bearer token which clients must send."""
    no_token: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let everybody in who can connect; only with a loopback host."""
    max_batch: int = 64
    """Samples in a request at most."""
    max_body_mb: float = 64.0
    """Length of a request at most, in MB (10^6 bytes)."""
    device: Device = "auto"
    modules: OwnModules = ()

    def __post_init__(self) -> None:
        FlowConfig.require(0 <= self.port <= 65535, "--port must be 0 to 65535.")
        FlowConfig.require(self.max_batch > 0, "--max-batch must be positive.")
        FlowConfig.require(0 < self.max_body_mb <= 4096, "--max-body-mb must be positive, and 4096 at most.")


@dataclass(frozen=True)
class ServedReward:
    """A reward with its name, and the device that it gets its samples on."""

    name: str
    reward: RewardFunction
    device: torch.device

    def __call__(self, samples: torch.Tensor, contexts: list[Any]) -> bytes:
        """Score the samples of a request; give the reply as bytes. The reward is checked as in training."""
        samples = samples.to(self.device)
        with torch.no_grad():
            output = self.reward(samples, contexts)
        if not isinstance(output, RewardOutput):
            output = RewardOutput(output)
        components = {
            key: check_reward(values, samples, contexts, f"{self.name}, component {key}")
            for key, values in output.components.items()
        }
        return wire.encode_reply(RewardOutput(check_reward(output.reward, samples, contexts, self.name), components))


def main(args: list[str] | None = None) -> int:
    """Run the program; give its exit code (0 stopped by a signal, 2 an error the message explains)."""
    return guarded(_main, args)


def _main(args: list[str]) -> int:
    description = f"{ServeConfig.__doc__}\n\n{names()}"
    config = tyro.cli(ServeConfig, args=args, prog=PROGRAM, description=description)
    if not config.reward:
        raise ConfigError(f"--reward must be given.\n\n{names()}")
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"flowrl.serve needs {error.name}: pip install 'flowrl-torch[server]'") from error
    token = _token(config)
    check_device(config.device)
    options = parse_options(config.reward_options)
    check_options(options, [config.reward])
    reward = make_reward(config.reward, options.get(config.reward))
    if getattr(reward, "groupwise", False) or getattr(reward, "pairwise", False):
        raise ConfigError(
            f"The reward '{config.reward}' compares samples of the same prompt, and cannot be served: a request holds "
            "some of them. Serve what it compares by, and compare in training: --env.reward 'winrate(remote)'."
        )
    served = ServedReward(config.reward, reward, get_device(config.device))
    service = Service(served, token, max_batch=config.max_batch, max_body=int(config.max_body_mb * 1e6))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with _listening(config.host, config.port) as sock:
        _serve(service, sock, config.host)
    print("stopped")
    return 0


def _serve(service: Service, sock: socket.socket, host: str) -> None:
    """Answer requests until a signal comes."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            application(service),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=STOP_SECONDS,
            limit_concurrency=CONNECTIONS,
        )
    )

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):  # before uvicorn's own are there, and when it has stopped
        signal.signal(number, stop)
    served, shown = service.served, f"[{host}]" if ":" in host else host
    print(f"reward: {getattr(served.reward, 'description', served.name)}, on {served.device}")
    print(f"serving {served.name} on http://{shown}:{sock.getsockname()[1]}", flush=True)
    server.run(sockets=[sock])


class _RefusedError(Exception):
    """A request that gets an error instead of a score."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Service:
    """A service that answers the requests of one reward.

    Args:
        served: What to serve; it is called in a worker thread, one call at a time.
        token: Bearer token to ask for; "" lets everybody in.
        max_batch: Samples per request.
        max_body: Bytes per request.
    """

    def __init__(self, served: ServedReward, token: str, *, max_batch: int, max_body: int) -> None:
        self.served, self.token, self.max_batch, self.max_body = served, token, max_batch, max_body
        self._reading, self._scoring = asyncio.Semaphore(AT_ONCE), asyncio.Lock()

    async def score(self, request: Request) -> Response:
        """Answer `POST /v1/score`."""
        from fastapi import Response

        self._check_head(request)
        async with self._reading:
            samples, contexts = await self._decoded(request)
            async with self._scoring:
                if await request.is_disconnected():
                    raise _RefusedError(400, "The client has gone away.")
                try:
                    body = await asyncio.to_thread(self.served, samples, contexts)
                except Exception as error:
                    request_id = uuid.uuid4().hex
                    _LOG.exception("request %s: the reward '%s' raised", request_id, self.served.name)
                    return _error_reply(500, f"The reward raised {type(error).__name__}.", request_id)
        return Response(body, media_type="application/json")

    async def health(self, request: Request) -> Response:
        """Answer `GET /health`, which needs no token and says no more than who this is."""
        from fastapi.responses import JSONResponse

        return JSONResponse({"reward": self.served.name, "version": __version__})

    def _check_head(self, request: Request) -> None:
        """Refuse whatever can be refused before the body is read."""
        given = request.headers.get("Authorization", "").encode()
        if self.token and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise _RefusedError(401, "The bearer token is missing or wrong.")
        kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which also keeps web pages in a browser of this machine from posting
            raise _RefusedError(415, "The Content-Type must be application/json.")
        if int(request.headers.get("Content-Length", 0)) > self.max_body:
            raise _RefusedError(413, f"The body has more than {self.max_body} bytes.")

    async def _decoded(self, request: Request) -> tuple[torch.Tensor, list[Any]]:
        from starlette.requests import ClientDisconnect

        try:
            body = await asyncio.wait_for(self._body(request), BODY_SECONDS)
            return await asyncio.to_thread(wire.decode_request, body, self.max_batch)
        except asyncio.TimeoutError as error:
            raise _RefusedError(408, f"The body has not arrived within {BODY_SECONDS:g} s.") from error
        except ClientDisconnect as error:
            raise _RefusedError(400, "The client has gone away.") from error
        except RewardError as error:
            raise _RefusedError(400, str(error)) from error
        except (MemoryError, OverflowError) as error:
            raise _RefusedError(413, "The request is too large for this machine.") from error

    async def _body(self, request: Request) -> bytes:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > self.max_body:  # a body sent in chunks has no Content-Length
                raise _RefusedError(413, f"The body has more than {self.max_body} bytes.")
        return bytes(data)


def application(service: Service) -> FastAPI:
    """Make the ASGI application of a service."""
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_route(wire.SCORE_PATH, service.score, methods=["POST"])  # plain routes: nothing reads the body before
    app.add_route(wire.HEALTH_PATH, service.health, methods=["GET"])
    app.add_exception_handler(_RefusedError, lambda request, error: _error_reply(error.status, str(error)))
    app.add_exception_handler(Exception, lambda request, error: _error_reply(500, "The server failed."))
    app.add_exception_handler(HTTPException, lambda request, error: _error_reply(error.status_code, error.detail))
    return app


def _error_reply(status: int, message: str, request_id: str | None = None) -> Response:
    from fastapi import Response

    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    body = wire.encode_error(message, request_id or uuid.uuid4().hex)
    return Response(body, status, headers, "application/json")


def _token(config: ServeConfig) -> str:
    """Read the token to ask for; "" with `--no-token`."""
    if config.no_token:
        if not _is_loopback(config.host):
            raise ConfigError(
                f"--no-token serves on a loopback host only (127.0.0.1, ::1, localhost), not on '{config.host}': "
                f"whoever reaches that address could use the reward. Put a token into {config.token_env}."
            )
        return ""
    token = wire.read_token(config.token_env)
    if not token:
        raise ConfigError(
            f"The variable {config.token_env}, which holds the token that clients must send, is not set. Set it: "
            f'export {config.token_env}=$(python -c "import secrets; print(secrets.token_urlsafe(32))"), '
            "or add --no-token to serve everybody on this machine."
        )
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"Cannot listen on {host}, port {port}: {error}. Choose another --host or --port.") from error


def names() -> str:
    """List the rewards, a line each."""
    return "\n".join(["rewards:", *(f"  {name:20s} {entry.summary}" for name, entry in REWARDS.items())])


if __name__ == "__main__":
    sys.exit(main())
