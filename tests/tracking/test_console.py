from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest

from rlhf.tracking.console import ConsoleProgress, summary


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that advances by so much at every look."""
    now = [0.0]

    def clock() -> float:
        now[0] += seconds
        return now[0]

    return clock


def test_summary_shows_four_key_metrics_in_a_fixed_order() -> None:
    metrics = {"policy/loss": 1.0, "kl/reference": 0.12345, "reward/score_mean": 2.0, "completion/length_mean": 7.0}
    assert summary({**metrics, "reward/gold_mean": 3.0}) == "reward 2  gold 3  KL 0.1235  length 7"
    assert summary({"optim/lr": 1.0}) == ""


def test_plain_lines_come_first_last_and_every_few_seconds() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(10, stream=stream, every_seconds=5.0, clock=ticking(2.0))
    for step in range(1, 11):
        progress.log(step, {"reward/score_mean": step / 10})
    progress.close("finished")
    shown = stream.getvalue().splitlines()
    # looks at 2, 4, 6, 8 … s: the first at 2 s, then each time 5 s have passed (8, 14, 20 s)
    assert [line.split("  ")[0] for line in shown] == ["step 1/10", "step 4/10", "step 7/10", "step 10/10"]
    assert shown[1] == "step 4/10  reward 0.4  0:00:12 left"  # 6 steps of 2 s
    assert shown[-1] == "step 10/10  reward 1"


def test_the_total_may_come_later() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(None, stream=stream, every_seconds=0.0, clock=ticking(1.0))
    progress.log(0, {})
    progress.set_total(2)
    progress.log(2, {})
    assert [line.strip() for line in stream.getvalue().splitlines()] == ["step 0", "step 2/2"]


def test_a_terminal_gets_a_bar_and_nothing_else_of_the_models_text_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = ConsoleProgress(4, stream=stream)
    progress.log(1, {"reward/score_mean": 0.5})
    progress.samples(1, [{"prompt": "[bold]p", "completion": "\x1b]0;pwned\x07\r\n[/bold]", "reward": None}])
    progress.log(4, {"reward/score_mean": 0.75})
    progress.close("finished")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())  # rich's own cursor and colour codes
    assert "4/4" in shown and "reward 0.75" in shown
    assert "prompt: [bold]p" in shown
    assert r"completion: \x1b]0;pwned\x07\x0d\n[/bold]" in shown
    assert "\x1b" not in shown and "\x07" not in shown


def test_samples_are_shown_now_and_then_and_on_one_line_each() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(9, stream=stream, samples_seconds=60.0, clock=ticking(25.0))
    for step in range(1, 5):
        progress.samples(step, [{"prompt": "p" * 500, "completion": "a\nb", "reward": 1.5}])
    progress.samples(5, [])
    shown = stream.getvalue().splitlines()
    assert [line[:16] for line in shown] == [
        "  step 1 prompt:",
        "  reward 1.5 com",
        "  step 4 prompt:",
        "  reward 1.5 com",
    ]
    assert max(map(len, shown)) < 200
