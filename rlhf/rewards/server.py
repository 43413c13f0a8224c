"""A reward model behind HTTP (``rlhf serve-reward``) as a source of scores. Text is the interface, or the policy's
token ids where they mean the same there.

What a server holds is asked for at the start and compared with every answer: another model in its place would change
the reward without an error, and ends the run instead.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal, Self

import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf.errors import ExitCode, UserError
from rlhf.rewards.contract import CONTRACT_PATH, IDENTITY_HEADER, IDS_PATH, SCORE_PATH, Contract, meanings
from rlhf.rewards.replicas import Away, Replicas, Reply
from rlhf.rollout import Group, Prompt, Rollout
from rlhf.runtime.background import Background

ROWS, BYTES = 64, 2**20  # of one request: enough for a forward, and little to send again
IN_FLIGHT = 4  # requests to each server at once: it is never idle, and others get their turn
START_SECONDS = 60.0
_SAME = {
    "vocabulary": "another vocabulary",
    "special_tokens": "other tokens that begin or end a row",
    "chat_template": "another chat template",
}
LARGEST = torch.finfo(torch.float32).max


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Asked:
    """Requests under way. stop: set = none of them is tried again. spans: when each was, with all its tries."""

    requests: list[Future[list[float]]]
    stop: threading.Event
    spans: list[tuple[float, float]]

    def give_up(self) -> None:
        self.stop.set()
        for request in self.requests:
            request.cancel()


@dataclass(frozen=True, kw_only=True)
class ServerReward:
    """One reward model on one or several servers.

    send: texts, which the server renders and tokenises, or the ids that the policy was given and drew. gather: this
    rank's object → every rank's (``Runtime.gather_objects``): a failure of one ends all of them alike.
    """

    contract: Contract
    replicas: Replicas
    gather: Callable[[Any], list[Any]] = _alone
    send: Literal["text", "ids"] = "text"
    pool: Background = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", Background(IN_FLIGHT * len(self.replicas.urls), "reward-server"))

    @property
    def name(self) -> str:
        return self.contract.name

    def score(self, rollout: Rollout, step: int = 0) -> Tensor:
        """[B] float32 on the rollout's device; NaN where the server gives no score.

        Raises UserError, on every rank: with code 75 where the servers stay away or are not what they were, with code 2
        for what they refuse.
        """
        return self.begin(rollout, step)()

    def ask(self, group: Group, step: int = 0) -> Asked:
        """Asks for one prompt's completions, in requests of their own; neither waits nor fails."""
        return self._ask([group], group.slot)

    def begin(self, rollout: Rollout, step: int = 0, asked: Sequence[Asked] | None = None) -> Callable[[], Tensor]:
        """The scores to come: every rank has to call what it returns. asked: by ``ask``, prompt by prompt; None = the
        whole rollout is asked for now."""
        answers = asked or [self._ask(list(rollout.groups()))]

        def finish() -> Tensor:
            scores, failure = [], None
            try:
                scores = _scores(answers)
            except UserError as error:
                failure = error
            first = next((error for error in self.gather(failure) if error is not None), None)
            if first is not None:
                raise first
            exact = torch.tensor(scores, dtype=torch.float64)  # a float32 comes back as it was sent
            return exact.to(torch.float32).to(rollout.group.device)

        return finish

    def score_texts(self, prompts: Sequence[Prompt], texts: Sequence[str], finished: Sequence[bool]) -> list[float]:
        """[B] scores in the order of the texts, NaN for none; requests run beside each other. Raises UserError."""
        return _scores([self._send(SCORE_PATH, prompts, _text_rows(prompts, texts, finished))])

    def with_ids(self, tokenizer: Any) -> Self:
        """The same, asked with token ids. tokenizer: the policy's. Raises UserError where an id means something else
        to the model there."""
        own, there = meanings(tokenizer), self.contract
        for name, what in _SAME.items():
            if getattr(there, name) != own[name]:
                raise UserError(
                    f"{self.replicas.key.removesuffix('url')}send=ids: {self.name} has {what} than the policy, whose "
                    "token ids would mean something else there; set send=text"
                )
        return replace(self, send="ids")

    def _ask(self, groups: Sequence[Group], first: int = 0) -> Asked:
        path, rows_of = (IDS_PATH, _id_rows) if self.send == "ids" else (SCORE_PATH, _rows_of)
        prompts = [group.prompt for group in groups for _ in group.texts]
        return self._send(path, prompts, [row for group in groups for row in rows_of(group)], first)

    def _send(self, path: str, prompts: Sequence[Prompt], rows: Sequence[bytes], first: int = 0) -> Asked:
        """first: the server whose turn it is, which must not depend on what else is asked meanwhile."""
        asked = Asked([], threading.Event(), [])
        for number, part in enumerate(_parts(prompts, rows, self.contract), first):
            asked.requests.append(self.pool.submit(self._timed, asked, path, number, *part))
        return asked

    def _timed(self, asked: Asked, path: str, number: int, body: bytes, rows: int) -> list[float]:
        began = time.monotonic()
        try:
            return self._part(path, number, body, rows, asked.stop)
        finally:
            asked.spans.append((began, time.monotonic()))

    def _part(self, path: str, number: int, body: bytes, rows: int, stop: threading.Event) -> list[float]:
        reply = self.replicas.ask(number, path, body, stop)
        if reply.headers.get(IDENTITY_HEADER) != self.contract.identity:
            raise UserError(
                f"{self.replicas.key}: {reply.url} now serves another model than {self.name} as it was at the start, "
                "which would change the reward in the middle of a run; serve the first one again, and the same "
                "command goes on",
                ExitCode.REWARD_GONE,
            )
        return self._checked(reply, rows)

    def _checked(self, reply: Reply, rows: int) -> list[float]:
        """The scores of an answer, one finite number or null each; anything else is refused, never mended."""
        found = reply.value.get("scores") if isinstance(reply.value, dict) else None
        if not isinstance(found, list):
            self.replicas.broken(reply.url, "answers without a list of scores")
        if len(found) != rows:
            self.replicas.broken(reply.url, f"answers with {len(found)} scores for {rows} completions")
        for value in found:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and abs(value) <= LARGEST):
                self.replicas.broken(reply.url, "answers with a score that is neither a finite number nor null")
        return [math.nan if value is None else float(value) for value in found]


def _scores(asked: Sequence[Asked]) -> list[float]:
    """All scores, in order. The first failure, wherever it is, ends the rest."""
    requests = [request for each in asked for request in each.requests]
    try:
        wait(requests, return_when=FIRST_EXCEPTION)
        for request in requests:
            if request.done() and (error := request.exception()) is not None:
                raise error
        return [score for request in requests for score in request.result()]
    except BaseException:
        for each in asked:
            each.give_up()
        raise


def connect(
    replicas: Replicas, gather: Callable[[Any], list[Any]] = _alone, seconds: float = START_SECONDS
) -> ServerReward:
    """Asks the servers what they hold. One that is away may come later; one must be there.

    Raises UserError: code 75 where none answers within ``seconds``, code 2 where two hold different models.
    """
    seconds = min(seconds, replicas.give_up_seconds)
    contracts = replicas.keep_trying(lambda: _contracts(replicas, seconds), seconds, threading.Event())
    (first, contract), *others = contracts.items()
    for url, other in others:
        if other.identity != contract.identity:
            raise UserError(
                f"{replicas.key}: {first} holds {contract.name} and {url} holds {other.name}, two different models (or "
                "one of them with another --dtype); servers that share the work must hold the same one"
            )
    return ServerReward(contract=contract, replicas=replicas, gather=gather)


def _contracts(replicas: Replicas, seconds: float) -> dict[str, Contract]:
    found, last = {}, Away("no server")
    for url in replicas.urls:
        try:
            found[url] = contract_at(replicas, url)
            replicas.is_there(url)
        except Away as error:
            replicas.is_away(url, error, seconds)
            last = error
    if not found:
        raise last
    return found


def contract_at(replicas: Replicas, url: str) -> Contract:
    """What one server holds, asked once. Raises Away, or UserError."""
    reply = replicas.exchange("GET", url, CONTRACT_PATH)
    try:
        return Contract.model_validate(reply.value)
    except ValidationError as error:
        at = ".".join(map(str, error.errors()[0]["loc"]))
        replicas.broken(url, f"answers {CONTRACT_PATH} with something that is no contract ({at or 'no object'})")


def describe(replicas: Replicas, tokenizer: Any = None) -> Iterator[str]:
    """One line a server: what it holds, or why that cannot be said. tokenizer: of a policy that is to send it ids."""
    for url in replicas.urls:
        try:
            held = contract_at(replicas, url)
        except (Away, UserError) as error:
            yield f"{replicas.key}: not asked what it holds: {error}"
            continue
        if tokenizer is not None:
            try:
                ServerReward(contract=held, replicas=replicas).with_ids(tokenizer)
            except UserError as error:
                yield f"a run would be refused: {error}"
        limit = f", {held.max_tokens} tokens at most" if held.max_tokens is not None else ""
        how = "deterministic" if held.deterministic else "batched"
        yield f"{replicas.key}: {url} holds {held.name} ({held.dtype}, {how}{limit})"


def _parts(prompts: Sequence[Prompt], rows: Sequence[bytes], contract: Contract) -> Iterator[tuple[bytes, int]]:
    """(body, rows) of each request. A function of the rows and the server's limits alone, so that what is asked again
    gets the same forwards; completions of a prompt stay together where they fit."""
    most, limit = min(ROWS, contract.max_texts), min(BYTES, contract.max_body_bytes)
    held: list[bytes] = []

    def fits(more: Sequence[bytes]) -> bool:
        return len(held) + len(more) <= most and len(_body([*held, *more])) <= limit

    for _, pairs in groupby(zip(prompts, rows, strict=True), key=lambda pair: id(pair[0])):
        group = [row for _, row in pairs]
        if held and not fits(group):
            yield _body(held), len(held)
            held = []
        for row in group:
            if held and not fits([row]):
                yield _body(held), len(held)
                held = []
            held.append(row)
    if held:
        yield _body(held), len(held)


def _text_rows(prompts: Sequence[Prompt], texts: Sequence[str], finished: Sequence[bool]) -> list[bytes]:
    """What is sent of each completion, as JSON."""
    return [
        _row(prompt=prompt.messages() or prompt.text, completion=text, finished=bool(ended))
        for prompt, text, ended in zip(prompts, texts, finished, strict=True)
    ]


def _rows_of(group: Group) -> list[bytes]:
    return _text_rows([group.prompt] * len(group.texts), group.texts, group.finished)


def _id_rows(group: Group) -> list[bytes]:
    """The same in the policy's token ids: what it was given and what it drew."""
    before, conversation = list(group.prompt_ids), group.prompt.conversational
    return [
        _row(prompt=before, completion=list(drawn), conversation=conversation, finished=ended)
        for drawn, ended in zip(group.ids, group.finished, strict=True)
    ]


def _row(**asked: Any) -> bytes:
    return json.dumps(asked, ensure_ascii=False, separators=(",", ":")).encode()


def _body(rows: Sequence[bytes]) -> bytes:
    return b'{"rows":[' + b",".join(rows) + b"]}"
