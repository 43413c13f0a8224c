"""Asking several servers of one model over HTTP: what is tried again, where, and for how long.

A server that is away (a dropped connection, 429, 5xx) may come back: its work goes to the others, and is tried again
with growing pauses until ``give_up_seconds`` have passed. Every other refusal would be the same the next time.
"""

from __future__ import annotations

import itertools
import json
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Never, TypeVar

import httpx
import tenacity

from rlhf.errors import ExitCode, UserError
from rlhf.tracking.redact import REDACTED, printable, redact_text

T = TypeVar("T")

CONNECT_SECONDS = 5.0
AWAY_SECONDS = 10.0  # how long a server that failed is left alone while others answer
LONGEST_PAUSE_SECONDS = 10.0
_MOST_SAID = 200  # characters of what a server said
_LARGEST_ANSWER = 4 * 2**20  # bytes; ten thousand scores take a twentieth of it


class Away(Exception):
    """A failure that another try may not meet. after: seconds that the server asked to be left alone."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


@dataclass(frozen=True)
class Reply:
    """A server's answer with status 200: which one, its headers, and its JSON."""

    url: str
    headers: httpx.Headers
    value: Any


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """Servers that hold the same model.

    key: how messages name the recipe's key. note: one line for the person at the terminal, when a server is first found
    away. give_up_seconds: how long a request is tried. pause_seconds: about how long the first pause is.
    """

    key: str
    urls: tuple[str, ...]
    token: str | None = field(default=None, repr=False)
    give_up_seconds: float = 600.0
    pause_seconds: float = 0.2
    note: Callable[[str], None] = lambda text: None
    http: httpx.Client = field(init=False, repr=False, compare=False)
    away: dict[str, float] = field(init=False, repr=False, compare=False, default_factory=dict)  # url → until when

    def __post_init__(self) -> None:
        object.__setattr__(self, "http", self._client())
        weakref.finalize(self, self.http.close)

    def _client(self) -> httpx.Client:
        """Goes where the recipe says and nowhere else: no proxies of the environment, no redirects."""
        token = {"authorization": f"Bearer {self.token}"} if self.token is not None else {}
        return httpx.Client(
            headers={"accept-encoding": "identity", **token},
            timeout=httpx.Timeout(max(self.give_up_seconds / 2, 1.0), connect=CONNECT_SECONDS),
            follow_redirects=False,
            trust_env=False,
            verify=ssl.create_default_context(),  # the machine's own authorities
        )

    def ask(self, number: int, path: str, body: bytes, stop: threading.Event) -> Reply:
        """Posts one request, first to the server whose turn it is by ``number``, then to the others.

        ``stop``: set = nothing is tried again. Raises UserError with code 75 when nobody answered in time, with code 2
        for what a server refuses.
        """
        turn = itertools.count(number)

        def attempt() -> Reply:
            url = self._choose(next(turn))
            try:
                reply = self.exchange("POST", url, path, body)
            except Away as error:
                self.is_away(url, error, self.give_up_seconds)
                raise
            self.is_there(url)
            return reply

        return self.keep_trying(attempt, self.give_up_seconds, stop)

    def keep_trying(self, attempt: Callable[[], T], seconds: float, stop: threading.Event) -> T:
        """Until it raises no ``Away``. Raises UserError with code 75."""
        pause = tenacity.wait_random_exponential(multiplier=self.pause_seconds, max=LONGEST_PAUSE_SECONDS)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            return 0.0 if self._there() else max(pause(state), getattr(error, "after", 0.0))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Away),
            wait=wait,
            stop=tenacity.stop_any(tenacity.stop_before_delay(seconds), tenacity.stop_when_event_set(stop)),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except Away as error:
            raise UserError(
                f"{self.key}: no reward from {', '.join(self.urls)} for {seconds:g} seconds; the last answer: {error}; "
                "the same command goes on when the server is back",
                ExitCode.REWARD_GONE,
            ) from error

    def exchange(self, method: str, url: str, path: str, body: bytes | None = None) -> Reply:
        """One request, once. Raises Away, or UserError."""
        headers = {"content-type": "application/json"} if body is not None else {}
        try:
            with self.http.stream(method, url + path, content=body, headers=headers) as response:
                raw = b"".join(self._limited(url, response))
        except httpx.RequestError as error:
            raise Away(f"{url}: {self._clean(str(error)) or 'no answer'} ({type(error).__name__})") from error
        if response.status_code == 429 or response.status_code >= 500:
            after = response.headers.get("retry-after", "")
            said = f"{url} says {response.status_code}: {self._said(raw)}"
            raise Away(said, min(float(after), LONGEST_PAUSE_SECONDS) if after.isdecimal() else 0.0)
        if response.status_code != 200:
            self._refused(url, response, raw)
        return Reply(url, response.headers, self._json(url, raw))

    def _limited(self, url: str, response: httpx.Response) -> Iterator[bytes]:
        size = 0
        for part in response.iter_bytes():
            size += len(part)
            if size > _LARGEST_ANSWER:
                self.broken(url, f"sends more than {_LARGEST_ANSWER} bytes, which no scores are")
            yield part

    def _json(self, url: str, raw: bytes) -> Any:
        def no_number(word: str) -> Never:
            raise ValueError(f"{word} is no number")

        try:
            return json.loads(raw, parse_constant=no_number)
        except ValueError:
            self.broken(url, f"answers with something that is not JSON: {self._clean(raw.decode('utf-8', 'replace'))}")

    def broken(self, url: str, said: str) -> Never:
        """For an answer that cannot be used, and that nobody would get rid of by asking again."""
        raise UserError(f"{self.key}: {url} {said}; is it `rlhf serve-reward`, undamaged?", ExitCode.REWARD_GONE)

    def _refused(self, url: str, response: httpx.Response, raw: bytes) -> Never:
        status = response.status_code
        if status in (401, 403):
            advice = "name the variable that holds its token in token_env"
        elif 300 <= status < 400:
            advice = "redirects are not followed, so name the address that it leads to"
        elif status in (404, 405):
            advice = "is it `rlhf serve-reward`?"
        else:
            advice = "the same request would be refused again"
        raise UserError(f"{self.key}: {url} refuses with {status}: {self._said(raw)}; {advice}")

    def _said(self, raw: bytes) -> str:
        """What an answer says of itself: its ``detail``, else its first characters."""
        text = raw[: 4 * _MOST_SAID].decode("utf-8", "replace")
        with suppress(ValueError, TypeError, KeyError):
            text = str(json.loads(raw)["detail"])
        return self._clean(text) or "nothing more"

    def _clean(self, text: str) -> str:
        text = redact_text(text if self.token is None else text.replace(self.token, REDACTED))
        return printable(" ".join(text.split()), newlines=False)[:_MOST_SAID]

    def _there(self) -> list[str]:
        """Those that answered last, or that may be tried again."""
        now = time.monotonic()
        return [url for url in self.urls if self.away.get(url, 0.0) <= now]

    def _choose(self, turn: int) -> str:
        candidates = self._there() or self.urls
        return candidates[turn % len(candidates)]

    def is_there(self, url: str) -> None:
        """A server has answered."""
        self.away.pop(url, None)

    def is_away(self, url: str, error: Away, seconds: float) -> None:
        """A server has not; that is told when it is found out, not at every try."""
        if url not in self.away:
            self.note(f"reward server: {error}; trying on for up to {seconds:g} seconds")
        self.away[url] = time.monotonic() + AWAY_SECONDS
