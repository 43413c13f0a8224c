"""``rlhf serve-policy`` with vLLM itself: weights pushed through files, completions over HTTP, a step ahead."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from rlhf.models.scratch import STOP_IDS
from rlhf.sampling.vllm_server import Server
from tests.sampling.test_hf import PROMPTS
from tests.vllm.runs import learned, prepare
from tests.vllm.test_engine import SLOTS, assert_greedy_text_is_ours, policy, sampler

pytest.importorskip("vllm")
TOKEN = "sesame"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served")
    prepare(place)
    return place


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(folder) as address:
        yield address


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rlhf", "serve-policy", "recipe.yaml", "rollout.token_env=TOKEN", f"--port={port}"]
    environment = {**os.environ, "TOKEN": TOKEN, "PYTHONPATH": str(Path(__file__).parents[2])}  # the recipe's reward
    process = subprocess.Popen([*command, "rollout.kv_cache_gib=1"], cwd=folder, env=environment)
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=10)) as client:  # 0, .5, 1, 2 … 128 seconds apart
            assert client.get(f"http://127.0.0.1:{port}/health", timeout=120).status_code == 200
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        assert process.wait(60) in (0, 143)


def test_after_an_update_its_greedy_text_is_ours(url: str, tmp_path: Path) -> None:
    assert_greedy_text_is_ours(Server(url=url, folder=tmp_path, dtype=torch.float32, token=TOKEN))


def test_it_draws_as_the_engine_of_the_process(url: str, tmp_path: Path) -> None:
    """The checks of a rollout act here too; a row is drawn by its seed alone."""
    server = Server(url=url, folder=tmp_path, dtype=torch.float32, token=TOKEN)
    lm = policy(2)
    together = sampler(server).sample(lm, PROMPTS, SLOTS, 3)
    alone = sampler(server).sample(lm, PROMPTS[2:3], [2], 3)
    assert together.texts[8:12] == alone.texts
    assert all(row[-1] in STOP_IDS for row, ended in zip(_rows(together), together.finished, strict=True) if ended)


def _rows(found: object) -> list[list[int]]:
    ids, mask = found.completion_ids, found.completion_mask  # type: ignore[attr-defined]
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("ahead", [False, True])
def test_five_steps_learn(url: str, folder: Path, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TOKEN", TOKEN)
    server = ("rollout.engine=vllm", f"rollout.url={url}", "rollout.token_env=TOKEN", f"rollout.ahead={ahead}".lower())
    hf, vllm = learned(folder / f"hf-{ahead}"), learned(folder / f"vllm-{ahead}", *server)
    assert ahead or vllm.gap < 1e-4  # nats a token; a step ahead it holds what the update did
    # the last completions that are seen ahead come of a policy with one update less
    expected = (hf.rewards[-2] if ahead else hf.rewards[-1]) - hf.rewards[0]
    assert expected > 0.1
    assert abs(expected - vllm.gain) < 0.5 * expected  # other random numbers: the same size, not the same figure
