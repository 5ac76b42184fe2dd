"""What a vision-language model behind an OpenAI-compatible server says of images: JSON over HTTP, never pickle."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from rftcore.documents import from_json
from rftcore.rewards.reward import RewardSpecError

# Of an answer, which is a few sentences with what servers say of themselves.
_LARGEST = 4 * 2**20
_LONGEST_WAIT_S = 30.0
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


class ChatServer:
    """A server that speaks OpenAI's chat completions, such as vLLM, SGLang, llama.cpp, or `rftcore.rewards.vlm_server`.

    A question about an image is one POST to `url`/chat/completions: the question and the image, a PNG in a data URI, as
    one user message, with temperature 0. What fails by the network, by a timeout, or with a status that may pass (408,
    425, 429, 5xx) is asked again, after 1, 2, 4, ... seconds, at most 30. Redirections are not followed.

    Args:
        url: of the API, such as http://localhost:8000/v1.
        model: as the server names it; None: the first that `url`/models lists.
        timeout_s: seconds that the server may be silent.
        retries: how often a question is asked again.
        key_variable: environment variable with the API key; None: no key is sent.

    Raises:
        RewardSpecError: for a `url` that is none, or a variable that is not set.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        timeout_s: float = 120.0,
        retries: int = 5,
        key_variable: str | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise RewardSpecError(
                f"VLM server: url={url!r} is no address; give one such as http://localhost:8000/v1 (a key goes by "
                "key_variable)"
            )
        if not timeout_s > 0 or retries < 0:
            raise RewardSpecError(
                f"VLM server: timeout_s={timeout_s} must be above 0, and retries={retries} at least 0"
            )
        self.url, self.model, self.timeout_s, self.retries = url.rstrip("/"), model, timeout_s, retries
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key_variable is not None:
            key = os.environ.get(key_variable)
            if not key:
                raise RewardSpecError(
                    f"VLM server: key_variable={key_variable!r}: the environment has no such variable; set it"
                )
            self._headers["Authorization"] = f"Bearer {key}"

    def describe(
        self, images: Sequence[Image.Image], question: str, max_new_tokens: int, at_once: int = 4
    ) -> list[str]:
        """Its answer for each image, stripped; `at_once` questions are under way together.

        Raises: RewardSpecError where the server cannot be asked, or answers what is no answer.
        """
        if self.model is None:
            self.model = self._first_model()
        with ThreadPoolExecutor(max_workers=max(1, at_once)) as pool:
            return list(pool.map(lambda image: self._answer(image, question, max_new_tokens), images))

    def _answer(self, image: Image.Image, question: str, max_new_tokens: int) -> str:
        content = [
            {"type": "image_url", "image_url": {"url": data_uri(image)}},
            {"type": "text", "text": question},
        ]
        response = self._request(
            "/chat/completions",
            {
                "model": self.model,
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": max_new_tokens,
            },
        )
        choices = response.get("choices")
        if not isinstance(choices, list) or len(choices) != 1:
            found = f"{len(choices)} choices" if isinstance(choices, list) else "no list of choices"
            raise self._wrong("/chat/completions", f"one choice is expected, and it gave {found}", response)
        message = choices[0].get("message") if isinstance(choices[0], dict) else None
        answer = message.get("content") if isinstance(message, dict) else None
        if not isinstance(answer, str):
            raise self._wrong("/chat/completions", "choices[0].message.content is no text", response)
        return answer.strip()

    def _first_model(self) -> str:
        response = self._request("/models", None)
        data = response.get("data")
        first = data[0] if isinstance(data, list) and data else None
        if not isinstance(first, dict) or not isinstance(first.get("id"), str):
            raise self._wrong("/models", "it names no model; set model", response)
        return first["id"]

    def _request(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON object that the server answers, asked for again where that may help."""
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(2.0 ** (attempt - 1), _LONGEST_WAIT_S))
            request = urllib.request.Request(self.url + path, data=data, headers=self._headers)
            try:
                with _OPENER.open(request, timeout=self.timeout_s) as response:
                    content = response.read(_LARGEST + 1)
            except urllib.error.HTTPError as error:
                problem = f"status {error.code} ({_first_line(error)})"
                if error.code not in _AGAIN:
                    raise RewardSpecError(f"VLM server {self.url}{path}: {problem}") from error
            # A timeout while the answer is read, a connection that is refused or cut.
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                problem = f"no answer in {self.timeout_s:g} s" if isinstance(reason, TimeoutError) else f"{reason}"
            else:
                return self._parsed(path, content)
        raise RewardSpecError(
            f"VLM server {self.url}{path}: {problem}, asked {self.retries + 1} times; see that it runs there, or raise "
            "timeout_s or retries"
        )

    def _parsed(self, path: str, content: bytes) -> dict[str, Any]:
        if len(content) > _LARGEST:
            raise self._wrong(path, f"its answer is longer than {_LARGEST} bytes", None)
        try:
            response = from_json(content)
        except ValueError as error:
            raise self._wrong(path, "its answer is not JSON", content[:200].decode("utf-8", "replace")) from error
        if not isinstance(response, dict):
            raise self._wrong(path, "its answer is no JSON object", response)
        return response

    def _wrong(self, path: str, what: str, response: Any) -> RewardSpecError:
        shown = f": {str(response)[:200]!r}" if response is not None else ""
        return RewardSpecError(f"VLM server {self.url}{path}: {what}{shown}")


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    # The images and the key go to the server that was named, and to no other.
    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirection)


def data_uri(image: Image.Image) -> str:
    """The image as a PNG in a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _first_line(error: urllib.error.HTTPError) -> str:
    """What an error's body begins with."""
    try:
        line = error.read(2000).decode("utf-8", "replace").strip().partition("\n")[0]
    except (OSError, http.client.HTTPException):
        line = ""
    return line[:200] or str(error.reason)
