"""A vision-language model served to `vlm_alignment`: `python -m rftcore.rewards.vlm_server --model FOLDER --port 8000`.

A small server for a second GPU or machine, of the standard library alone; one question is answered at a time. A serving
system that speaks the same protocol (vLLM, SGLang) answers many at once. The protocol is a part of OpenAI's:

- GET /v1/models: {"object": "list", "data": [{"id": NAME, "object": "model"}]}.
- POST /v1/chat/completions with a JSON object: "messages" is one user message whose "content" holds one
  {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}} (PNG, JPEG or WebP) and one
  {"type": "text", "text": QUESTION}; "max_tokens" and "model" may be given, "temperature" must be 0 or left out.
  The answer is {"object": "chat.completion", "model": NAME, "choices": [{"index": 0, "finish_reason": "stop",
  "message": {"role": "assistant", "content": ANSWER}}]}.
- What is wrong is said by {"error": {"message": ...}} with the status 400, 404, 413 or 500.

Nothing but what is in a request is opened: an address of an image is refused. It listens on this machine alone unless
--host says otherwise, and asks for no key: put it behind a firewall or a tunnel.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import io
import json
import re
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from rftcore.rewards.checkpoints import DTYPES
from rftcore.rewards.reward import RewardSpecError
from rftcore.rewards.vlm import Describer

_LARGEST_REQUEST = 64 * 2**20
_LARGEST_SIDE = 4096
_FORMATS = ("PNG", "JPEG", "WEBP")
_DATA_URI = re.compile(r"data:image/(png|jpeg|webp);base64,")
_TOKENS, _MOST_TOKENS = 64, 1024


class _Refused(ValueError):
    """A request that is not served, with its status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class VlmServer(ThreadingHTTPServer):
    """Answers questions about images by a describer.

    Args:
        describer: has `describe(images, question, max_new_tokens)`, as `rftcore.rewards.vlm.Describer`.
        name: of the model, as it is listed.
        host, port: where it listens; port 0 takes a free one, which `server_address` tells.
    """

    daemon_threads = True

    def __init__(self, describer: Any, name: str, host: str = "127.0.0.1", port: int = 8000) -> None:
        super().__init__((host, port), _Handler)
        self.describer, self.name, self.lock = describer, name, threading.Lock()

    def answer(self, request: Any) -> dict[str, Any]:
        """The response to a chat completion. Raises: ValueError for one that is not served."""
        image, question, max_tokens = _read(request)
        with self.lock:
            (text,) = self.describer.describe([image], question, max_tokens)
        message = {"role": "assistant", "content": text}
        return {
            "object": "chat.completion",
            "model": self.name,
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }


class _Handler(BaseHTTPRequestHandler):
    server: VlmServer
    timeout = 60

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": self.server.name, "object": "model"}]})
        else:
            self._error(404, f"no such path {self.path!r}; there are /v1/models and /v1/chat/completions")

    def do_POST(self) -> None:
        try:
            if self.path != "/v1/chat/completions":
                raise _Refused(f"no such path {self.path!r}; there is /v1/chat/completions", 404)
            response = self.server.answer(self._body())
        except _Refused as error:
            self._error(error.status, str(error))
        except Exception as error:  # noqa: BLE001  # whatever the model raises: the server goes on
            self.log_error("%s: %s", type(error).__name__, error)
            self._error(500, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            self._send(200, response)

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused("the request needs a Content-Length")
        if int(length) > _LARGEST_REQUEST:
            raise _Refused(f"the request is longer than {_LARGEST_REQUEST} bytes", 413)
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _Refused(f"the request is not JSON ({error})") from error

    def _error(self, status: int, message: str) -> None:
        # What is left of the request would be read as the next one.
        self.close_connection = True
        self._send(status, {"error": {"message": message, "type": "invalid_request_error", "code": status}})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _read(request: Any) -> tuple[Image.Image, str, int]:
    """The image, question and most tokens of a request."""
    if not isinstance(request, dict):
        raise _Refused("the request is no JSON object")
    if request.get("temperature") not in (None, 0):
        raise _Refused(f"temperature={request['temperature']!r}: answers are greedy; give 0, or leave it out")
    if request.get("stream") or request.get("n") not in (None, 1):
        raise _Refused("one whole answer is given: leave stream and n out")
    max_tokens = request.get("max_tokens", _TOKENS)
    if type(max_tokens) is not int or not 1 <= max_tokens <= _MOST_TOKENS:
        raise _Refused(f"max_tokens={max_tokens!r} must be a whole number from 1 to {_MOST_TOKENS}")
    messages = request.get("messages")
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise _Refused("messages must hold one message of the user")
    parts = messages[0].get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise _Refused("messages[0].content must be a list of one image_url and one text")
    kinds = sorted(str(part.get("type")) for part in parts)
    if kinds != ["image_url", "text"]:
        raise _Refused(f"messages[0].content must be one image_url and one text, not {', '.join(kinds) or 'nothing'}")
    by_kind = {part["type"]: part for part in parts}
    question, address = by_kind["text"].get("text"), by_kind["image_url"].get("image_url")
    if not isinstance(question, str) or not isinstance(address, dict) or not isinstance(address.get("url"), str):
        raise _Refused("text.text and image_url.url must be strings")
    return _picture(address["url"]), question, max_tokens


def _picture(uri: str) -> Image.Image:
    start = _DATA_URI.match(uri)
    if start is None:
        raise _Refused("image_url.url must be a data URI of a PNG, JPEG or WebP in base64; addresses are not fetched")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(uri[start.end() :], validate=True)), formats=_FORMATS)
        if max(image.size) > _LARGEST_SIDE:
            raise _Refused(f"the image has {image.width} x {image.height} pixels; at most {_LARGEST_SIDE} a side")
        return image.convert("RGB")
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _Refused(f"the image does not read ({error})") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Loads the model, serves it until it is interrupted, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rftcore.rewards.vlm_server", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="an image-text-to-text model, hub name or folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all, without any key")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cpu", help="such as cuda, cuda:1")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    options = parser.parse_args(arguments)
    try:
        describer = Describer(options.model, options.dtype).to(options.device)
        server = VlmServer(describer, options.model, options.host, options.port)
    except (RewardSpecError, OSError, RuntimeError) as error:
        print(f"vlm_server: error: {error}", file=sys.stderr)
        return 2
    with server:
        print(f"{options.model} is served at http://{options.host}:{server.server_port}/v1", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
