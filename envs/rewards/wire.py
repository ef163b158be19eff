"""Wire format of remote rewards, version 1: samples, contexts and scores as JSON.

The client (`flowrl.envs.rewards.remote`) and the server (`flowrl.serve`) both write and read with this module;
docs/remote-rewards.md describes the format for other implementations.
"""

from __future__ import annotations

import base64
import io
import json
import math
import numbers
import os
import re
import reprlib
import struct
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import torch
from PIL import Image

from flowrl.errors import ConfigError, RewardError
from flowrl.types import RewardOutput

SCORE_PATH, HEALTH_PATH = "/v1/score", "/health"
ENCODINGS = ("png", "float16", "float32")
MAX_VALUES = 2**28  # numbers in the samples of a request: 1 GiB once decoded to float32
MAX_DIMENSIONS = 8
MAX_NAME = 100  # characters of a component's name
MAX_BRACKETS = 10**6  # empty lists take twenty times the memory that they have as text

_DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
_MAX_FLOAT32 = float(torch.finfo(torch.float32).max)
_PNG_HEADER = struct.Struct(">8s4x4sIIBB")  # signature, chunk length, "IHDR", width, height, bit depth, colour type
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode_request(samples: torch.Tensor, contexts: Sequence[Any], encoding: str) -> bytes:
    """Encode samples with their contexts as the body of a request.

    Args:
        samples: (B, *sample_shape), on any device; for "png" (B, 3, H, W) with values in [0, 1].
        contexts: B strings, numbers or None.
        encoding: "png" (rounds to 1/255), "float16" or "float32".

    Raises:
        RewardError: Samples or contexts that this encoding cannot carry.
    """
    request = {
        "encoding": encoding,
        "shape": list(samples.shape[1:]),
        "samples": [base64.b64encode(data).decode() for data in _encode_samples(samples, encoding)],
        "contexts": [_plain(context) for context in contexts],
    }
    return json.dumps(request, allow_nan=False).encode()


def decode_request(body: bytes, max_batch: int) -> tuple[torch.Tensor, list[Any]]:
    """Decode samples (B, *sample_shape) as float32 on the CPU, and B contexts; trusts nothing in the body.

    Raises:
        RewardError: Not of this format, or beyond its limits. The message is fit to be sent to the client.
    """
    request = _fields(body, {"encoding", "shape", "samples", "contexts"})
    encoding, samples, contexts = request["encoding"], request["samples"], request["contexts"]
    if encoding not in ENCODINGS:
        raise RewardError(f"encoding must be one of {', '.join(ENCODINGS)}, not {reprlib.repr(encoding)}.")
    if not (isinstance(samples, list) and isinstance(contexts, list) and len(samples) == len(contexts)):
        raise RewardError("samples and contexts must be lists of the same length.")
    if not 1 <= len(samples) <= max_batch:
        raise RewardError(f"A request may have 1 to {max_batch} samples, not {len(samples)}.")
    shape = _checked_shape(request["shape"], encoding, len(samples))
    contexts = [_plain(context) for context in contexts]
    decoded = np.empty((len(samples), *shape), dtype=np.float32)
    for i, text in enumerate(samples):
        decoded[i] = _decode_sample(text, encoding, shape, f"samples[{i}]")
    if not np.isfinite(decoded).all():
        raise RewardError("The samples must be finite numbers.")
    return torch.from_numpy(decoded), contexts


def encode_reply(output: RewardOutput) -> bytes:
    """Encode reward and components (B,) as the body of a reply."""
    components = {name: values.tolist() for name, values in output.components.items()}
    return json.dumps({"reward": output.reward.tolist(), "components": components}, allow_nan=False).encode()


def decode_reply(body: bytes, n_samples: int) -> RewardOutput:
    """Decode reward and components, float32 (n_samples,) on the CPU.

    Raises:
        RewardError: Not of this format, or not one finite number per sample.
    """
    reply = _fields(body, {"reward"}, {"components"})
    components = reply.get("components", {})
    if not isinstance(components, dict):
        raise RewardError("components must be an object of lists.")
    for name in components:
        if not (name.isprintable() and 1 <= len(name) <= MAX_NAME):  # a terminal takes some others for commands
            raise RewardError(
                f"The name of a component must have 1 to {MAX_NAME} printable characters, not {reprlib.repr(name)}."
            )
    return RewardOutput(
        _scores(reply["reward"], n_samples, "reward"),
        {name: _scores(values, n_samples, f"component {reprlib.repr(name)}") for name, values in components.items()},
    )


def encode_error(message: str, request_id: str) -> bytes:
    """Encode the body of a reply that is an error."""
    return json.dumps({"error": message, "request_id": request_id}).encode()


def decode_error(body: bytes) -> str:
    """Decode a server's error, quoted and cut to be printed; any body is taken."""
    try:
        reply = _fields(body, {"error"}, {"request_id"})
    except RewardError:
        return repr(body[:200].decode("utf-8", "replace"))
    request_id = f" (request {str(reply['request_id'])[:40]!r})" if "request_id" in reply else ""
    return f"{str(reply['error'])[:500]!r}{request_id}"


def read_token(variable: str) -> str:
    """Read the bearer token from an environment variable, "" when it is not set.

    Raises:
        ConfigError: Not the name of a variable, or its value is no token. Neither is repeated: it may be the secret.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise ConfigError("token_env takes the name of an environment variable, not the token itself.")
    token = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise ConfigError(f"The token in {variable} must be printable ASCII characters without spaces.")
    return token


def _encode_samples(samples: torch.Tensor, encoding: str) -> list[bytes]:
    values = samples.detach().float()
    if encoding == "png":
        if values.ndim != 4 or values.shape[1] != 3:
            raise RewardError(
                f"Only images (B, 3, H, W) can be sent as png, not {tuple(values.shape)}: choose float16 or float32."
            )
        levels = (values * 255).round()
        if not bool(((levels >= 0) & (levels <= 255)).all()):  # NaN fails both
            raise RewardError(
                f"Images sent as png must have values in [0, 1]; these go from {values.min().item():.3g} to "
                f"{values.max().item():.3g}. Choose float16 or float32 to send them as they are."
            )
        return [_encode_png(pixels) for pixels in levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()]
    array = (values.half() if encoding == "float16" else values).cpu().numpy()
    if not np.isfinite(array).all():
        raise RewardError(f"The samples are not finite as {encoding} and cannot be sent.")
    return [row.astype(_DTYPES[encoding]).tobytes() for row in array]


def _encode_png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1)  # a few times faster, some 10 % larger
    return stream.getvalue()


def _decode_sample(text: Any, encoding: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{name} is not base64.") from error
    if encoding == "png":
        return _decode_png(data, shape, name)
    dtype = _DTYPES[encoding]
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise RewardError(f"{name} has {len(data)} bytes; shape {list(shape)} in {encoding} has {expected}.")
    return np.frombuffer(data, dtype).reshape(shape)


def _decode_png(data: bytes, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Decode pixels (3, H, W) in [0, 1]. The header is compared with the shape before anything is decompressed."""
    if len(data) < _PNG_HEADER.size:
        raise RewardError(f"{name} is no PNG file.")
    signature, chunk, width, height, depth, colour = _PNG_HEADER.unpack_from(data)
    if (signature, chunk) != (_PNG_SIGNATURE, b"IHDR"):
        raise RewardError(f"{name} is no PNG file.")
    if (3, height, width) != shape or (depth, colour) != (8, 2):
        raise RewardError(
            f"{name} is a PNG of {width}x{height} pixels, bit depth {depth}, colour type {colour}; the request's shape "
            f"{list(shape)} asks for {shape[2]}x{shape[1]} pixels, bit depth 8, colour type 2 (RGB)."
        )
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if (image.size, image.mode) != ((width, height), "RGB"):  # a second header: Pillow follows the last one
                raise ValueError("other headers follow the first")
            pixels = np.asarray(image)
    except Exception as error:  # what Pillow raises on damaged files is not documented
        raise RewardError(f"{name} is a damaged PNG file.") from error
    return pixels.transpose(2, 0, 1) / np.float32(255)


def _checked_shape(shape: Any, encoding: str, n_samples: int) -> tuple[int, ...]:
    sizes = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    if not (sizes and 1 <= len(shape) <= MAX_DIMENSIONS):
        raise RewardError(f"shape must be a list of 1 to {MAX_DIMENSIONS} positive integers.")
    if encoding == "png" and (len(shape) != 3 or shape[0] != 3):
        raise RewardError(f"Samples sent as png have the shape [3, height, width], not {reprlib.repr(shape)}.")
    if n_samples * math.prod(shape) > MAX_VALUES:
        raise RewardError(f"{n_samples} samples of this shape are more than {MAX_VALUES} numbers: send fewer at once.")
    return tuple(shape)


def _plain(context: Any) -> str | int | float | None:
    """Convert a context to what JSON can carry."""
    if context is None or isinstance(context, str):
        return context
    if isinstance(context, numbers.Integral) and not isinstance(context, bool):
        return int(context)
    if isinstance(context, numbers.Real) and not isinstance(context, bool) and math.isfinite(context):
        return float(context)
    raise RewardError(f"A context must be a string, a finite number or null, not {reprlib.repr(context)}.")


def _scores(values: Any, n_samples: int, name: str) -> torch.Tensor:
    if not isinstance(values, list) or len(values) != n_samples:
        came = f"{len(values)} entries" if isinstance(values, list) else reprlib.repr(values)
        raise RewardError(f"{name} must be a list of {n_samples} numbers, one per sample; it has come as {came}.")
    for i, value in enumerate(values):
        if type(value) not in (int, float) or not abs(value) <= _MAX_FLOAT32:
            raise RewardError(f"{name} is {reprlib.repr(value)} for sample {i}; it must be a finite float32 number.")
    return torch.tensor(values, dtype=torch.float32)


def _fields(body: bytes, required: Set[str], optional: Set[str] = frozenset()) -> dict[str, Any]:
    """Parse the JSON object in a body, with exactly these fields."""
    if sum(map(body.count, (b"[", b"{", b":"))) > MAX_BRACKETS:
        raise RewardError(f"The body has more than {MAX_BRACKETS} brackets and colons.")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RewardError("The body is not JSON.") from error
    if not isinstance(value, dict):
        raise RewardError("The body is not a JSON object.")
    if missing := required - value.keys():
        raise RewardError(f"Missing fields: {', '.join(sorted(missing))}.")
    if unknown := value.keys() - required - optional:
        known = ", ".join(sorted({*required, *optional}))
        raise RewardError(f"Unknown field {reprlib.repr(min(unknown))}. Known: {known}.")
    return value
