"""A reward model over HTTP: who may ask, what may be asked, and how an answer looks. JSON only.

The event loop reads and writes; the model is the scorer's thread's alone. A refusal is one line under ``detail``.
"""

from __future__ import annotations

import asyncio
import hmac
import queue
import sys
import traceback
from dataclasses import dataclass
from typing import TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

from rlhf.errors import UserError
from rlhf.programs import reward_requests as requests
from rlhf.programs.reward_queue import Asked, Scorer, Scores
from rlhf.rewards.contract import CONTRACT_PATH, IDENTITY_HEADER, IDS_PATH, SCORE_PATH, Contract

Body = TypeVar("Body", requests.ScoreRequest, requests.IdsRequest, requests.OpenRLHFRequest)

RETRY_SECONDS = 1  # what a client is told that finds the queue full
_READ_ON = 8  # a body of up to so many times the limit is read to its end, so that its sender reads the refusal


@dataclass(frozen=True)
class Service:
    """What the routes call. token: None = whoever reaches the port may ask. bos: the model's own."""

    scorer: Scorer
    contract: Contract
    token: str | None
    bos: str | None

    async def health(self) -> JSONResponse:
        """``GET /health``: whether the server takes requests; asks for no token."""
        return JSONResponse({"status": "ok"})

    async def promise(self, request: Request) -> JSONResponse:
        """``GET /v1/contract``."""
        self._authorised(request)
        return self._answer(self.contract.model_dump())

    async def score(self, request: Request) -> JSONResponse:
        """``POST /v1/score``: {"rows": [{"prompt", "completion", "finished"}]} → {"scores": [number or null]}."""
        body = await self._read(request, requests.SCORE)
        return self._answer({"scores": await self._scores(body.asked())})

    async def score_ids(self, request: Request) -> JSONResponse:
        """``POST /v1/score/ids``: the same with prompt and completion in token ids. Whoever asks has compared the
        contract's digests."""
        body = await self._read(request, requests.IDS)
        return self._answer({"scores": await self._scores(body.asked())})

    async def get_reward(self, request: Request) -> JSONResponse:
        """``POST /get_reward``, OpenRLHF's shape: {"query": [text]} → {"rewards": [number or null]}."""
        body = await self._read(request, requests.OPENRLHF)
        return self._answer({"rewards": await self._scores(body.asked(self.bos))})

    def _answer(self, content: dict[str, object]) -> JSONResponse:
        return JSONResponse(content, headers={IDENTITY_HEADER: self.contract.identity})

    def _authorised(self, request: Request) -> None:
        if self.token is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise HTTPException(401, "no token, or not this server's", {"WWW-Authenticate": "Bearer"})

    async def _read(self, request: Request, shape: TypeAdapter[Body]) -> Body:
        """The body, checked in the order of what it costs: token, content type, size, shape, number of texts."""
        self._authorised(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, "content-type must be application/json")
        raw = await self._bytes(request)
        try:
            body = await run_in_threadpool(shape.validate_json, raw)
        except ValidationError as error:
            raise HTTPException(422, requests.refusal(error)) from None
        if len(body) > self.contract.max_texts:
            raise HTTPException(413, f"more than {self.contract.max_texts} texts in one request")
        return body

    async def _bytes(self, request: Request) -> bytes:
        limit, size, parts = self.contract.max_body_bytes, 0, list[bytes]()
        declared = request.headers.get("content-length", "")
        too_large = HTTPException(413, f"the body is larger than {limit} bytes")
        if declared.isdecimal() and int(declared) > _READ_ON * limit:
            raise too_large
        try:
            async for part in request.stream():
                size += len(part)
                if size > _READ_ON * limit:
                    raise too_large
                if size <= limit:
                    parts.append(part)
        except ClientDisconnect:
            raise HTTPException(400, "the body broke off") from None  # nobody reads this; it is no error of ours
        if size > limit:
            raise too_large
        return b"".join(parts)

    async def _scores(self, asked: Asked) -> Scores:
        try:
            waiting = self.scorer.submit(asked)
        except queue.Full:
            raise HTTPException(503, "too many requests wait", {"Retry-After": str(RETRY_SECONDS)}) from None
        try:
            return await asyncio.wrap_future(waiting)
        except UserError as error:  # what was asked cannot be read, whoever asks
            raise HTTPException(422, _one_line(error)) from None
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
            raise HTTPException(500, f"scoring failed: {type(error).__name__}: {_one_line(error)}") from None


def application(service: Service) -> FastAPI:
    """The routes. There are no pages of documentation: their scripts would come from elsewhere."""
    app = FastAPI(title="rlhf reward server", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route(CONTRACT_PATH, service.promise, methods=["GET"])
    app.add_api_route(SCORE_PATH, service.score, methods=["POST"])
    app.add_api_route(IDS_PATH, service.score_ids, methods=["POST"])
    app.add_api_route("/get_reward", service.get_reward, methods=["POST"])
    return app


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
