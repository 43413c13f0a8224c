"""The client of a vLLM server, against a server that speaks as vLLM does. tests/vllm has the real one."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.errors import UserError
from rlhf.models.policy import ScoredModel
from rlhf.programs.serve_policy import options
from rlhf.sampling.completions import Completion, Ends
from rlhf.sampling.engine import EngineSampler, Request
from rlhf.sampling.vllm import InProcess, Start
from rlhf.sampling.vllm_server import Server
from tests.sampling.engines import TOKEN, Copy, served
from tests.sampling.test_engine import PROMPTS, sampler
from tests.sampling.test_hf import TOKENIZER
from tests.support import tiny_lm

ENDS = Ends(TOKENIZER)


@pytest.fixture
def engine() -> Copy:
    return Copy()


@pytest.fixture
def url(engine: Copy) -> Iterator[str]:
    with served(engine) as address:
        yield address


def client(url: str, folder: Path, token: str | None = TOKEN) -> Server:
    return Server(url=url, folder=folder, dtype=torch.float32, token=token)


def test_completions_are_those_of_the_engine_itself(url: str, engine: Copy, tmp_path: Path) -> None:
    policy = ScoredModel(tiny_lm(0)).causal_lm
    through: EngineSampler = sampler(client(url, tmp_path))
    found = through.sample(policy, PROMPTS, [0, 1, 2], 1)
    direct = sampler(Copy()).sample(policy, PROMPTS, [0, 1, 2], 1)
    assert found.completion_ids.tolist() == direct.completion_ids.tolist()
    assert found.rollout_logprobs is not None and torch.equal(found.rollout_logprobs, direct.rollout_logprobs)
    assert engine.log == ["push", "reset", "push", "reset", *["decode"] * 6]
    assert list(tmp_path.iterdir()) == []  # weights are not left lying about


def test_a_push_removes_what_a_killed_one_left(url: str, tmp_path: Path) -> None:
    (tmp_path / "push-killed").mkdir()
    (tmp_path / "push-killed" / "00000.safetensors").write_bytes(b"half of it")
    client(url, tmp_path).push(None, tiny_lm(0).state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_a_push_waits_for_what_is_being_decoded(url: str, engine: Copy, tmp_path: Path) -> None:
    server = client(url, tmp_path)
    server.push(None, tiny_lm(0).state_dict().items())
    pending = server.begin([Request([5], 1.0, seed) for seed in range(20)], 4, ENDS)
    server.push(None, tiny_lm(1).state_dict().items())
    assert engine.log == ["push", "reset", *["decode"] * 20, "push", "reset"]
    assert [row.ids for row in pending()] == [
        Copy(lm=tiny_lm(0).eval()).decode(Request([5], 1.0, seed), 4).ids for seed in range(20)
    ]


def test_it_tells_of_a_row_while_others_are_decoded(tmp_path: Path) -> None:
    """The third row waits until somebody was told of the other two."""
    told, enough = list[tuple[int, int, bool]](), threading.Event()

    class Waits(Copy):
        def decode(self, request: Request, max_new_tokens: int) -> Completion:
            assert request.seed != 3 or enough.wait(60)
            return super().decode(request, max_new_tokens)

    def each(row: int, ids: list[int], finished: bool) -> None:
        told.append((row, len(ids), finished))
        if len(told) == 2:
            enough.set()

    with served(Waits(), lock=contextlib.nullcontext()) as url:
        requests = [Request([5], 1.0, seed) for seed in (1, 3, 2)]
        found = client(url, tmp_path).begin(requests, 4, ENDS, each)()
    assert sorted(told[:2]) == [(0, 4, False), (2, 4, False)] and told[2] == (1, 4, False)
    assert [row.ids for row in found] == [Copy().decode(request, 4).ids for request in requests]


def test_weights_come_whole_in_several_files(
    url: str, engine: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.sampling.vllm_server.FILE_BYTES", 1)
    state = tiny_lm(3).state_dict()
    client(url, tmp_path).push(None, state.items())
    assert all(torch.equal(value, state[name]) for name, value in engine.pushes[0].items())
    assert engine.pushes[0].keys() == state.keys()


def test_a_server_that_refuses_is_named_with_what_it_said(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"rollout.url={re.escape(url)}: the server answered 401 .*Unauthorized"):
        client(url, tmp_path, token="wrong").begin([Request([5], 1.0, 1)], 4, ENDS)()


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no answer .*is `rlhf serve-policy` running"):
        client("http://127.0.0.1:9", tmp_path).push(None, tiny_lm(0).state_dict().items())


def test_what_vllm_is_started_with() -> None:
    """As keyword arguments for one process and as options for a server: nothing that differs between the two."""
    arguments = Start(tokens=96, dtype=torch.bfloat16).arguments()
    written = options(arguments)
    assert written[:2] == ["--worker-extension-cls", "rlhf.sampling.vllm_worker.PolicyWorker"]
    assert written[written.index("--max-model-len") + 1] == "96"
    assert written[written.index("--dtype") + 1] == "bfloat16"
    assert "--enable-prefix-caching" in written
    assert ("--no-enable-chunked-prefill" in written) == (arguments.get("enable_chunked_prefill") is False)


def test_vllm_gives_its_memory_back_between_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Awake before weights arrive, asleep once the completions are there; where it is not to sleep it never does."""
    monkeypatch.setattr("rlhf.sampling.vllm._parameters", lambda *_: None)

    class Told:
        """Writes down what vLLM would be told."""

        def __init__(self) -> None:
            self.log: list[str] = []

        def __getattr__(self, name: str) -> Callable[..., list[Any]]:
            return lambda *_, **__: self.log.append(name) or []

    for sleeps in (True, False):
        engine, told = InProcess(start=Start(tokens=96, dtype=torch.float32), sleeps=sleeps), Told()
        engine.__dict__["_llm"] = told
        engine.push(None, [])
        engine.begin([Request([5], 1.0, 1)], 4, ENDS)()
        pushed = ["collective_rpc", "collective_rpc", "reset_prefix_cache", "generate"]
        assert told.log == (["wake_up", *pushed, "sleep"] if sleeps else pushed)
