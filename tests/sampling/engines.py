"""An engine to sample with where vLLM is not: a copy of the policy, in this process or behind a real HTTP server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf.sampling.completions import Completion, Each, Ends, nobody
from rlhf.sampling.engine import Pending, Request
from tests.support import tiny_lm


@dataclass
class Copy:
    """Decodes with its own copy of the weights, and takes no more pushes than ``deaf_after``. tells: of rows as they
    end. log: what it was asked to do, in order."""

    deaf_after: int | None = None
    tells: bool = False
    pushes: list[dict[str, Tensor]] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    lm: Any = field(default_factory=lambda: tiny_lm(9).eval())

    def push(self, config: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.log.append("push")
        self.pushes.append({name: value.clone() for name, value in weights})
        if self.deaf_after is None or len(self.pushes) <= self.deaf_after:
            self.lm.load_state_dict(self.pushes[-1])

    def begin(self, requests: Sequence[Request], max_new_tokens: int, ends: Ends, each: Each = nobody) -> Pending:
        self.log.append(f"begin {len(requests)}")
        self.asked += requests
        found = []
        for row, request in enumerate(requests):
            found.append(self.decode(request, max_new_tokens))
            if self.tells:
                each(row, found[-1].ids, found[-1].finished)
        return lambda: found

    @torch.no_grad()
    def decode(self, request: Request, max_new_tokens: int) -> Completion:
        ids, logprobs = list(request.prompt_ids), []
        generator = torch.Generator().manual_seed(request.seed or 0)
        for _ in range(max_new_tokens):
            logits = self.lm(torch.tensor([ids])).logits[0, -1].float()
            known = (logits / (request.temperature or 1.0)).log_softmax(-1)
            choice = torch.multinomial(known.exp(), 1, generator=generator) if request.temperature else known.argmax()
            ids.append(int(choice))
            logprobs.append(float(known[ids[-1]]))
        return Completion(ids[-max_new_tokens:], torch.tensor(logprobs), False)


TOKEN = "sesame"


@contextmanager
def served(engine: Copy, lock: AbstractContextManager[Any] | None = None) -> Iterator[str]:
    """The address of a server with those of vLLM's calls that we use. It asks for ``TOKEN`` where vLLM would, and does
    one thing at a time unless ``lock`` says otherwise."""
    lock = lock or threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            with lock:
                if self.path == "/collective_rpc":
                    self._answer(200, self._take(body))
                elif self.path == "/reset_prefix_cache":
                    engine.log.append("reset")
                    self._answer(200, {"success": True})
                elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self._answer(401, {"error": "Unauthorized"})
                else:
                    self._answer(200, self._completion(body))

        def _take(self, body: dict[str, Any]) -> dict[str, Any]:
            assert body["method"] == "take_policy"
            files = sorted(Path(body["args"][0]).glob("*.safetensors"))
            engine.push(None, [item for file in files for item in load_file(file).items()])
            return {"results": [None]}

        def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
            engine.log.append("decode")
            request = Request(body["prompt"], body["temperature"], body["seed"])
            found = engine.decode(request, body["max_tokens"])
            logprobs = {"token_logprobs": found.logprobs.tolist()}
            return {"choices": [{"token_ids": found.ids, "logprobs": logprobs, "finish_reason": "length"}]}

        def _answer(self, code: int, body: dict[str, Any]) -> None:
            raw = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on stderr."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = False  # closing waits for them: one that still computes when the process ends aborts it

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
