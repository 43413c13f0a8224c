"""What a reward server takes, what it refuses and how, and that it ends in order."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.programs import serve_reward
from rlhf.programs.reward_queue import Scorer, Texts
from rlhf.programs.serve_reward import Options
from rlhf.rewards.contract import IDENTITY_HEADER, contract_of, model_digest
from rlhf.rollout import Prompt, Turn
from tests.rewards.serving import TOKENIZER, Running, running, tiny

MODEL = tiny()
ROW = {"prompt": "The film", "completion": " is small"}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(MODEL, max_texts=8, max_body_bytes=2000) as found:
        yield found


def post(url: str, path: str = "/v1/score", **given: Any) -> httpx.Response:
    return httpx.post(url + path, trust_env=False, timeout=30.0, **given)


# ---- what is asked, and answered


def test_a_text_and_a_conversation(server: Running) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    rows = [ROW, {"prompt": chat, "completion": "Paris", "finished": False}, {**ROW, "finished": True}]
    answer = post(server.url, json={"rows": rows})
    first, second, third = answer.json()["scores"]
    assert answer.headers[IDENTITY_HEADER] == server.contract.identity
    plain = MODEL.score_texts([Prompt(row_id=0, text="The film")], [" is small"])
    conversation = MODEL.score_texts([Prompt(row_id=0, turns=(Turn(**chat[0]),))], ["Paris"], [False])
    assert [first, third] == pytest.approx([float(plain)] * 2, abs=1e-6)
    assert second == pytest.approx(float(conversation), abs=1e-6) and abs(first - second) > 0.01


def test_the_contract_says_what_a_score_depends_on(server: Running) -> None:
    told = httpx.get(server.url + "/v1/contract", trust_env=False).json()
    assert told == server.contract.model_dump()
    assert (told["name"], told["max_tokens"], told["dtype"]) == ("judge", 2048, "float32")
    settings: dict[str, Any] = {"deterministic": False, "max_texts": 1, "max_body_bytes": 1, "version": "2"}
    assert contract_of(tiny(), **settings).identity == told["identity"]  # limits and versions change no score
    assert contract_of(tiny(seed=2), **settings).identity != told["identity"]
    other = tiny()
    with torch.no_grad():
        other.model.score.weight[0, 0] += 1e-6  # type: ignore[index, union-attr, operator]
    assert model_digest(other.model) != told["model"]


def test_health_asks_for_nothing(server: Running) -> None:
    with running(MODEL, token="x" * 20) as locked:
        assert httpx.get(locked.url + "/health", trust_env=False).json() == {"status": "ok"}
        assert httpx.get(locked.url + "/v1/contract", trust_env=False).status_code == 401


def test_openrlhfs_shape(server: Running) -> None:
    """Its client sends whole texts with their special tokens, and what it does not need."""
    text = "<bos>The film is small<eos>"
    body = {"query": [text, text.removeprefix("<bos>")], "prompts": ["The film"] * 2, "labels": [None, "x"]}
    answer = post(server.url, "/get_reward", json=body).json()
    assert list(answer) == ["rewards"]
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    with torch.no_grad():
        exact = float(MODEL.forward([ids])[0])
    assert answer["rewards"] == pytest.approx([exact, exact], abs=1e-6)


# ---- what is refused


@pytest.mark.parametrize(
    "token", [None, "Bearer wrong", "Bearer", "secret-secret", "bearer secret-secret", "Bearer \xe9"]
)
def test_a_wrong_token(token: str | None) -> None:
    with running(MODEL, token="secret-secret") as locked:
        headers = {} if token is None else {"authorization": token.encode("latin-1")}
        for path in ("/v1/score", "/get_reward"):
            answer = post(locked.url, path, content=b"not even JSON", headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        right = {"authorization": "Bearer secret-secret"}
        assert post(locked.url, json={"rows": [ROW]}, headers=right).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-pickle", "application/octet-stream", "", None])
def test_another_content_type(kind: str | None, server: Running) -> None:
    headers = {} if kind is None else {"content-type": kind}
    assert post(server.url, content=b'{"rows": []}', headers=headers).status_code == 415


def test_json_may_say_its_encoding(server: Running) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    content = b'{"rows": [{"prompt": "a", "completion": "b"}]}'
    assert post(server.url, content=content, headers=headers).status_code == 200


SECRET = "a private sentence"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{nope " + SECRET.encode(), "body: is not JSON"),
        (b"", "body: is not JSON"),
        (b"[]", "body: "),
        (b"{}", "rows: Field required"),
        (b'{"rows": []}', "rows: "),
        (b'{"rows": [{"prompt": "a"}]}', "rows.0.completion: Field required"),
        (b'{"rows": [{"prompt": "a", "completion": 7}]}', "rows.0.completion: "),
        (b'{"rows": [{"prompt": [], "completion": "b"}]}', "rows.0.prompt."),
        (b'{"rows": [{"prompt": "a", "completion": "b", "finished": "yes"}]}', "rows.0.finished: "),
        (b'{"rows": [{"prompt": "a", "completion": "b", "' + SECRET.encode() + b'": 1}]}', "rows.0."),
        (b'{"rows": [{"prompt": [{"role": "user", "content": ["' + SECRET.encode() + b'"]}], "completion": "b"}]}', ""),
        (b'{"rows": [{"prompt": [{"role": "system", "content": "x"}], "completion": "b"}]}', "the chat template"),
        (b'{"rows": [{"prompt": "<bos><bos>", "completion": "b"}]}', "row 0 renders to"),
        (b'{"query": ["a"]}', "rows: Field required"),
    ],
    ids=range(14),
)
def test_another_shape(body: bytes, said: str, server: Running) -> None:
    answer = post(server.url, content=body, headers=JSON)
    detail = answer.json()["detail"]
    assert answer.status_code == 422 and detail.startswith(said) and len(detail) < 300 and "\n" not in detail


def test_values_are_not_echoed(server: Running) -> None:
    body = {"rows": [{"prompt": "a", "completion": {"text": SECRET}}]}
    assert SECRET not in post(server.url, json=body).text
    assert SECRET not in post(server.url, "/get_reward", json={"query": [[SECRET]]}).text


def test_too_many_texts_and_too_long_bodies(server: Running) -> None:
    assert post(server.url, json={"rows": [ROW] * 8}).status_code == 200
    answer = post(server.url, json={"rows": [ROW] * 9})
    assert (answer.status_code, answer.json()) == (413, {"detail": "more than 8 texts in one request"})
    for size in (2001, 16_000, 4_000_000):
        answer = post(server.url, content=b"x" * size, headers=JSON)
        assert (answer.status_code, answer.json()) == (413, {"detail": "the body is larger than 2000 bytes"})

    def parts() -> Iterator[bytes]:  # no content-length
        yield from [b"x" * 500] * 5

    assert post(server.url, content=parts(), headers=JSON).status_code == 413


def test_other_paths_and_methods(server: Running) -> None:
    for path in ("/", "/docs", "/openapi.json", "/v2/score"):
        assert httpx.get(server.url + path, trust_env=False).status_code == 404
    assert httpx.get(server.url + "/v1/score", trust_env=False).status_code == 405


# ---- the queue


@dataclass
class Held:
    """A model whose scoring waits until it is let go, and that remembers what it scored together."""

    go: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    together: list[int] = field(default_factory=list)

    def render(self, prompts: Sequence[Prompt], texts: Sequence[str], finished: Sequence[bool]) -> list[list[int]]:
        if "refused" in texts:
            raise UserError("refused")
        return [[len(text)] for text in texts]

    def score_rows(self, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]) -> Tensor:
        self.begun.set()
        assert self.go.wait(30)
        if [5] in rows:  # "spoil"
            raise RuntimeError("spoiled")
        self.together.append(len(rows))
        return torch.tensor([float(row[0]) if row[0] else torch.nan for row in rows])


def asked(*texts: str) -> Texts:
    return Texts(prompts=[Prompt(row_id=0, text="")] * len(texts), texts=texts, finished=[True] * len(texts))


def scorer(model: Held, *, merge: bool, budget_tokens: int = 100) -> Scorer:
    return Scorer(model, merge=merge, budget_tokens=budget_tokens, waiting=8)  # type: ignore[arg-type]


@pytest.mark.parametrize(("merge", "together"), [(False, [1, 2, 1, 1]), (True, [1, 4])])
def test_what_waits_is_scored_together_or_not(merge: bool, together: list[int]) -> None:
    """While the first request is scored three others come: a, bb + nothing, ccc, dddd."""
    model = Held()
    queue = scorer(model, merge=merge)
    first = queue.submit(asked("a"))
    assert model.begun.wait(30)
    others = [queue.submit(asked(*texts)) for texts in (("bb", ""), ("ccc",), ("dddd",))]
    model.go.set()
    assert [future.result(30) for future in (first, *others)] == [[1.0], [2.0, None], [3.0], [4.0]]
    queue.close()
    assert model.together == together


def test_together_means_up_to_the_budget() -> None:
    """Each row is one token: two requests fill a budget of two."""
    model = Held()
    queue = scorer(model, merge=True, budget_tokens=2)
    queue.submit(asked("a"))
    assert model.begun.wait(30)
    others = [queue.submit(asked("bb")) for _ in range(4)]
    model.go.set()
    queue.close()  # answers all that was submitted
    assert all(future.result() == [2.0] for future in others) and sorted(model.together) == [1, 2, 2]


@pytest.mark.parametrize("merge", [True, False])
def test_one_bad_request_spoils_no_other(merge: bool) -> None:
    model = Held()
    queue = scorer(model, merge=merge)
    first = queue.submit(asked("a"))
    assert model.begun.wait(30)
    good, bad, refused = (queue.submit(asked(text)) for text in ("ccc", "spoil", "refused"))
    model.go.set()
    assert first.result(30) == [1.0] and good.result(30) == [3.0]
    with pytest.raises(RuntimeError, match="spoiled"):
        bad.result(30)
    with pytest.raises(UserError, match="refused"):
        refused.result(30)
    assert queue.submit(asked("a")).result(30) == [1.0]  # it lives on
    queue.close()


@pytest.fixture
def held() -> Iterator[tuple[Held, Running, ThreadPoolExecutor]]:
    """A server with room for two waiting requests, whose model is held."""
    model = Held()
    with running(MODEL, waiting=2) as server, ThreadPoolExecutor(8) as pool:
        server.scorer._model = model  # type: ignore[assignment]
        yield model, server, pool
        model.go.set()


def test_a_full_queue_says_when_to_come_back(held: tuple[Held, Running, ThreadPoolExecutor]) -> None:
    model, server, pool = held
    first = pool.submit(post, server.url, json={"rows": [ROW]})
    assert model.begun.wait(30)  # it left the queue
    waiting = [pool.submit(post, server.url, json={"rows": [ROW]}) for _ in range(3)]
    refused = next(iter(_completed(waiting)))  # the other two cannot be answered yet
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert httpx.get(server.url + "/health", trust_env=False).status_code == 200  # nothing blocks the event loop
    model.go.set()
    codes = sorted(future.result().status_code for future in (first, *waiting))
    assert codes == [200, 200, 200, 503]


def _completed(futures: Sequence[Any]) -> Iterator[httpx.Response]:
    from concurrent.futures import as_completed

    for future in as_completed(futures, timeout=30):
        yield future.result()


def test_scoring_that_fails_is_500_and_the_server_lives(
    held: tuple[Held, Running, ThreadPoolExecutor], capfd: pytest.CaptureFixture[str]
) -> None:
    model, server, _ = held
    model.go.set()
    answer = post(server.url, json={"rows": [{"prompt": "", "completion": "spoil"}]})
    assert (answer.status_code, answer.json()) == (500, {"detail": "scoring failed: RuntimeError: spoiled"})
    assert "Traceback" in capfd.readouterr().err  # for whoever looks after the server
    assert post(server.url, json={"rows": [ROW]}).status_code == 200


# ---- the command


def test_strangers_need_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RM_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "my-host"):
        with pytest.raises(UserError, match=rf"--host {host} lets other machines ask, and there is no token") as info:
            serve_reward.main("nothing", Options(host=host))
        assert "\n" not in str(info.value)
    with pytest.raises(UserError, match="--token-env: the environment variable RM_TOKEN is not set"):
        serve_reward.main("nothing", Options(host="0.0.0.0", token_env="RM_TOKEN"))
    monkeypatch.setenv("RM_TOKEN", "é")
    with pytest.raises(UserError, match="that an HTTP header cannot") as info:
        serve_reward.main("nothing", Options(token_env="RM_TOKEN"))
    assert "é" not in str(info.value)


def test_a_taken_port_and_a_missing_model_are_said_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot be had"):
        serve_reward.main("nothing/at/all", Options(port=taken.getsockname()[1]))
    with pytest.raises(UserError, match="does not exist"):
        serve_reward.main("nothing/at/all", Options(port=0))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_reward, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UserError, match=r"needs uvicorn, .* pip install 'rlhf\[serve\]'"):
        serve_reward.main("nothing", Options())


def test_a_signal_that_comes_before_the_server_listens_to_any_ends_it_too() -> None:
    server = SimpleNamespace(should_exit=False)
    before = signal.getsignal(signal.SIGTERM)
    with serve_reward._ending_in_order(server):
        signal.raise_signal(signal.SIGTERM)
    assert server.should_exit and signal.getsignal(signal.SIGTERM) is before


def test_a_signal_ends_it_after_the_requests_it_has_accepted(tmp_path: Path) -> None:
    """One process: its line, its exit code, and a request whose body comes only after the signal."""
    MODEL.model.save_pretrained(tmp_path / "judge")  # type: ignore[operator]
    TOKENIZER.save_pretrained(tmp_path / "judge")
    command = [sys.executable, "-m", "rlhf", "serve-reward", "judge", "--port", "0", "--token-env", "RM_TOKEN"]
    environment = {**os.environ, "RM_TOKEN": "a-token-of-mine", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("judge (float32) is served at http://127.0.0.1:"), process.stderr.read()
        port = int(line.rpartition(":")[2])
        body = json.dumps({"rows": [{**ROW, "completion": f" is {row} wonders"} for row in range(300)]}).encode()
        head = (
            "POST /v1/score HTTP/1.1\r\nhost: x\r\nauthorization: Bearer a-token-of-mine\r\nexpect: 100-continue\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode())
            assert b" 100 " in connection.recv(1000)  # it is being read
            process.send_signal(signal.SIGTERM)
            connection.sendall(body)
            answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        scores = json.loads(answer.partition("\r\n\r\n")[2])["scores"]
        assert len(scores) == 300 and None not in scores
        assert process.wait(30) == 0
        rest = process.stdout.read() + process.stderr.read()
    assert "a-token-of-mine" not in rest and "Traceback" not in rest
