"""vLLM in processes of its own, started by ``rlhf serve-policy``: decodes while the trainer computes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors import SafetensorError
from torch import Tensor

from rlhf.errors import UserError
from rlhf.runtime.background import Background
from rlhf.sampling.completions import Completion, Each, Ends, nobody
from rlhf.sampling.engine import Pending, Request

MODEL = "policy"  # what the server calls it
_PUSH = "push-"
FILE_BYTES = 4 * 2**30
PATIENCE = httpx.Timeout(30.0, read=1700.0, pool=None)  # a row may wait for others; less than a process group waits
MOST = httpx.Limits(max_connections=256, max_keepalive_connections=256)  # vLLM's own most at once, and few sockets


def _one_thread() -> Background:
    return Background(1, "vllm-server")


@dataclass(frozen=True, kw_only=True)
class Server:
    """An Engine at ``url``. folder: weights pass through files in it, so the server's machine must see it too; no other
    run may use it, since what a killed push left there goes with the next one.

    dtype: what the weights are rounded to. token: what the server was started with. One thing is done at a time and in
    the order it was asked for: a push waits for the rollout that is being decoded. What runs in ``queue`` computes no
    tensors: the end of the process would abort it in the middle. Raises UserError where the server cannot be reached or
    refuses.
    """

    url: str
    folder: Path
    dtype: torch.dtype
    token: str | None = field(default=None, repr=False)
    queue: Background = field(default_factory=_one_thread)

    def push(self, config: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{_PUSH}*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_PUSH, dir=self.folder, ignore_cleanup_errors=True) as name:
            place = Path(name).resolve()
            self._write(weights, place)
            self.queue.submit(self._take, str(place)).result()

    def begin(self, requests: Sequence[Request], max_new_tokens: int, ends: Ends, each: Each = nobody) -> Pending:
        asked = [_body(request, max_new_tokens, ends) for request in requests]
        choices = self.queue.submit(lambda: asyncio.run(self._decode(asked, each)))
        return lambda: [_completion(choice) for choice in choices.result()]

    def _take(self, place: str) -> None:
        with self._told(), httpx.Client(**self._client()) as client:
            _fine(client.post("/collective_rpc", json={"method": "take_policy", "args": [place]}))
            # else prompts seen before would be read with the old weights
            _fine(client.post("/reset_prefix_cache"))

    def _write(self, weights: Iterable[tuple[str, Tensor]], place: Path) -> None:
        try:
            _write(weights, place, self.dtype)
        except (OSError, SafetensorError) as error:
            raise UserError(f"rollout.push_folder={self.folder}: weights could not be written ({error})") from error

    async def _decode(self, bodies: Sequence[dict[str, Any]], each: Each) -> list[dict[str, Any]]:
        async def one(row: int, body: dict[str, Any]) -> dict[str, Any]:
            choice: dict[str, Any] = _fine(await client.post("/v1/completions", json=body)).json()["choices"][0]
            each(row, list(choice["token_ids"]), _stopped(choice))
            return choice

        with self._told():
            async with httpx.AsyncClient(**self._client(), limits=MOST) as client:
                return await asyncio.gather(*(one(row, body) for row, body in enumerate(bodies)))

    def _client(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return {"base_url": self.url, "headers": headers, "timeout": PATIENCE, "trust_env": False}  # no proxies

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong on the way, as something that the user can act on."""
        try:
            yield
        except httpx.HTTPStatusError as error:
            said = error.response.text.strip().split("\n")[0][:300]
            raise UserError(
                f"rollout.url={self.url}: the server answered {error.response.status_code} to "
                f"{error.request.url.path} ({said}); start it with `rlhf serve-policy` and this recipe"
            ) from error
        except httpx.HTTPError as error:
            raise UserError(
                f"rollout.url={self.url}: no answer ({type(error).__name__}: {error}); is `rlhf serve-policy` running "
                "there with this recipe? A run that was cut off goes on from its last checkpoint"
            ) from error


def _fine(reply: httpx.Response) -> httpx.Response:
    return reply.raise_for_status()


def _write(weights: Iterable[tuple[str, Tensor]], place: Path, dtype: torch.dtype) -> None:
    """safetensors files of a few gigabytes: no second copy of the whole model is made."""
    from safetensors.torch import save_file

    part, size, files = dict[str, Tensor](), 0, 0
    for name, value in weights:
        part[name] = value.detach().to("cpu", dtype, copy=True).contiguous()  # tied weights would share memory
        size += part[name].numel() * part[name].element_size()
        if size >= FILE_BYTES:
            save_file(part, place / f"{files:05}.safetensors")
            part, size, files = {}, 0, files + 1
    if part:
        save_file(part, place / f"{files:05}.safetensors")


def _body(request: Request, max_new_tokens: int, ends: Ends) -> dict[str, Any]:
    """The recipe's sampling and nothing else, as the completions endpoint takes it."""
    return {
        "model": MODEL,
        "prompt": list(request.prompt_ids),
        "temperature": request.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "seed": request.seed,
        "max_tokens": max_new_tokens,
        "stop": list(ends.strings),
        "stop_token_ids": list(ends.ids),
        "ignore_eos": True,  # the stop ids are ours to name
        "logprobs": 0,  # of the sampled token
        "return_token_ids": True,
    }


def _completion(choice: dict[str, Any]) -> Completion:
    logprobs = torch.tensor(choice["logprobs"]["token_logprobs"], dtype=torch.float32)
    return Completion(list(choice["token_ids"]), logprobs, _stopped(choice))


def _stopped(choice: dict[str, Any]) -> bool:
    return bool(choice["finish_reason"] == "stop")
