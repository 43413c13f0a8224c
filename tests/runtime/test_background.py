"""Calls beside the main thread: in order, with their results, and never in the way of the end of the process."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhf.runtime.background import Background
from tests.rewards.serving import Answer, made_up, scripted

DECODES = """
from rlhf.sampling.completions import Ends
from rlhf.sampling.engine import Request
from rlhf.sampling.vllm_server import Server
server = Server(url=url, folder=Path("pushed"), dtype=torch.float32)
server.begin([Request([5], 1.0, 1)], 4, Ends(None))
"""
SCORES = """
from rlhf.rollout import Prompt, Rollout
from tests.rewards.serving import client
batch = Rollout.from_ids([[5]], [[6]], prompts=(Prompt(row_id=0, text="a"),), texts=("b",),
                         sample=torch.zeros(1), finished=torch.ones(1))
waiting = client(url, give_up_seconds=600.0).begin(batch)
"""
# Told to stop, a run finishes its step and returns; so does this.
PROGRAM = """
import signal, sys, threading
from pathlib import Path
import torch
url, told = sys.argv[1], threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
{begin}
told.wait()
print("over")
"""


@pytest.mark.parametrize("begin", [DECODES, SCORES], ids=["decodes", "scores"])
def test_a_process_that_is_told_to_stop_does_not_wait_for_a_server(begin: str) -> None:
    asked, over = threading.Event(), threading.Event()

    def never(body: bytes) -> Answer:
        asked.set()
        over.wait()
        return 0, {}, b""

    with scripted(made_up(), never) as server:
        command = [sys.executable, "-c", PROGRAM.format(begin=begin), server.url]
        root = Path(__file__).resolve().parents[2]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert asked.wait(60)
                process.send_signal(signal.SIGTERM)
                said, _ = process.communicate(timeout=15)  # seconds to leave torch; the servers' patience is minutes
            finally:
                process.kill()
                over.set()
    assert (said, process.returncode) == ("over\n", 0)


def test_calls_begin_in_their_order_and_hand_back_what_they_found() -> None:
    order: list[int] = []
    queue = Background(1, "test")

    def call(number: int, *, fails: bool) -> int:
        order.append(number)
        if fails:
            raise ValueError(number)
        return number

    found = [queue.submit(call, number, fails=number == 2) for number in range(4)]
    assert [found[number].result() for number in (0, 1, 3)] == [0, 1, 3] and order == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="2"):
        found[2].result()


def test_no_more_threads_than_asked_for_and_none_that_stay() -> None:
    before, gate, queue = threading.active_count(), threading.Event(), Background(3, "test")
    found = [queue.submit(gate.wait, 60) for _ in range(10)]
    assert threading.active_count() == before + 3
    assert found[9].cancel()  # has not begun
    gate.set()
    assert all(future.result() for future in found[:9])
    threads = list(queue._threads)
    del queue
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
