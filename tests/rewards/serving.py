"""Reward servers for tests: the real one in a thread, one that dies on command, and one that answers by a script."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import uvicorn

from rlhf.models.scratch import build_config, build_reward_model, train_tokenizer
from rlhf.programs.reward_queue import Scorer
from rlhf.programs.reward_service import Service, application
from rlhf.rewards.contract import IDENTITY_HEADER, Contract, contract_of
from rlhf.rewards.model import RewardModel
from rlhf.rewards.replicas import Replicas
from rlhf.rewards.server import ServerReward, connect
from rlhf.rollout import Prompt, Turn

TOKENIZER = train_tokenizer(["The film is a small wonder and it knows it.", "What is the capital of France?"], 320)


def tiny(seed: int = 1, **changes: Any) -> RewardModel:
    settings: dict[str, Any] = {"layers": 2, "hidden_size": 32, "heads": 2, "vocab_size": len(TOKENIZER), **changes}
    return RewardModel(
        name="judge", model=build_reward_model(build_config("gemma", **settings), seed=seed), tokenizer=TOKENIZER
    )


def texts(count: int, k: int = 4) -> tuple[list[Prompt], list[str], list[bool]]:
    """Conversations and plain texts by turns, k completions each, all different, a third of them cut off."""
    prompts = []
    for row in range(count):
        if row % k:
            prompts.append(prompts[-1])
        elif row % (2 * k):
            prompts.append(Prompt(row_id=row, text=f"The film {row}"))
        else:
            prompts.append(Prompt(row_id=row, turns=(Turn(role="user", content=f"Is it {row}?"),)))
    return prompts, [f" is {row} wonders" for row in range(count)], [row % 3 > 0 for row in range(count)]


@dataclass
class Running:
    """A server in a thread."""

    url: str
    contract: Contract
    scorer: Scorer


@contextmanager
def running(
    model: RewardModel,
    *,
    port: int = 0,
    token: str | None = None,
    deterministic: bool = True,
    waiting: int = 64,
    max_texts: int = 1024,
    max_body_bytes: int = 2**24,
) -> Iterator[Running]:
    """The service on a free port of this machine; on leaving it answers what it has accepted and is gone."""
    contract = contract_of(
        model, deterministic=deterministic, max_texts=max_texts, max_body_bytes=max_body_bytes, version="test"
    )
    scorer = Scorer(model, merge=not deterministic, budget_tokens=model.microbatch_tokens, waiting=waiting)
    app = application(Service(scorer, contract, token, model.tokenizer.bos_token))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="off"))
    listener = socket.create_server(("127.0.0.1", port))  # it listens already: who asks early waits
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.start()
    try:
        yield Running(url, contract, scorer)
    finally:
        server.should_exit = True
        thread.join()
        scorer.close()


def client(*urls: str, **settings: Any) -> ServerReward:
    """A client that gives up soon and pauses shortly."""
    start = settings.pop("seconds", 5.0)
    given: dict[str, Any] = {"give_up_seconds": 5.0, "pause_seconds": 0.01, "key": "reward.models.0.url", **settings}
    return connect(Replicas(urls=urls, **given), seconds=start)


Answer = tuple[int, dict[str, str], bytes]  # status, headers, body; status 0 = the connection is cut


@dataclass
class Script:
    """What a scripted server does: each POST takes the next entry, the last one for ever. asked: bodies that came."""

    contract: Contract
    answers: Sequence[Answer | Callable[[bytes], Answer]]
    url: str = ""
    asked: list[bytes] = field(default_factory=list)


def made_up(**changes: object) -> Contract:
    """The contract of a server whose scores are made up."""
    digest = "0" * 64
    values: dict[str, object] = {
        **{"identity": digest, "name": "made-up", "model": digest, "vocabulary": digest, "chat_template": None},
        **{"center": 0.0, "max_tokens": None, "dtype": "float32", "deterministic": True, "version": "1"},
        **{"max_texts": 1024, "max_body_bytes": 2**24},
    }
    return Contract.model_validate({**values, **changes})


@contextmanager
def scripted(contract: Contract, *answers: Answer | Callable[[bytes], Answer]) -> Iterator[Script]:
    """A server that tells this contract truthfully and answers scores as it is told."""
    script = Script(contract, answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # a connection a request, so that a server that is gone answers nothing more

        def do_GET(self) -> None:
            self.send(200, {}, contract.model_dump_json().encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            turn = script.answers[min(len(script.asked), len(script.answers) - 1)]
            script.asked.append(body)
            self.send(*(turn(body) if callable(turn) else turn))

        def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            if status == 0:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in {
                IDENTITY_HEADER: contract.identity,
                "content-length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        script.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()
