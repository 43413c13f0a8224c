"""Held-out figures of a reward model, from scores that were chosen by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.data.examples import Demonstration, Preference
from rlhf.maths.ranking import Estimate
from rlhf.programs.reward_bench import SECTIONS, sections
from rlhf.programs.reward_figures import HeldOut, by_category, figures, held_out
from rlhf.rollout import Prompt


def pair(prompt: str, chosen: str, rejected: str, **columns: object) -> Preference:
    return Preference(Prompt(row_id=0, text=prompt, columns=columns), chosen, rejected)


PAIRS = [
    pair("p", "a", "b", subset="x", chosen_first=True),
    pair("p", "b", "c", subset="x", chosen_first=False),
    pair("p", "a", "c", subset="y", chosen_first=False),
    pair("q", "a", "b", subset="y"),
]
SCORES = {("p", "a"): 3.0, ("p", "b"): 1.0, ("p", "c"): 2.0, ("q", "a"): 0.0, ("q", "b"): 1.0}
LENGTHS = {"a": 4.0, "b": 2.0, "c": 2.0}


def given(rows: HeldOut) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.tensor([SCORES[prompt.text, text] for prompt, text in rows.items], dtype=torch.float64)
    return scores, torch.tensor([LENGTHS[text] for _, text in rows.items], dtype=torch.float64)


def test_each_completion_is_scored_once() -> None:
    rows = held_out(PAIRS)
    assert sorted((prompt.text, text) for prompt, text in rows.items) == sorted(SCORES)  # five, and not eight
    assert rows.cluster.tolist() == [0, 0, 0, 1]


def test_the_figures_by_hand() -> None:
    rows = held_out(PAIRS)
    found = figures(rows, *given(rows))
    assert found["eval/accuracy"] == 0.5  # a>b right, b>c wrong, a>c right, q wrong
    # p's deviations ½ − ½ + ½, q's −½: prompts are the observations
    assert found["eval/accuracy_error"] == pytest.approx(math.sqrt(0.25 + 0.25) / 4)
    assert found["eval/margin"] == pytest.approx((2 - 1 + 1 - 1) / 4)
    assert found["eval/score_mean"] == pytest.approx(7 / 5)
    assert found["eval/length_accuracy"] == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert found["eval/position_accuracy"] == pytest.approx(1 / 3)
    assert found["eval/pairs"] == 4 and found["eval/unscorable_pairs"] == 0
    assert found["eval/accuracy/lowest"] == 0.0 and found["eval/accuracy/highest"] == 1.0
    assert found["eval/confidence/highest"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert "eval/auc" not in found


def test_what_cannot_be_scored_is_left_out_and_counted() -> None:
    rows = held_out(PAIRS)
    scores, lengths = given(rows)
    scores[1] = torch.nan  # p's b
    found = figures(rows, scores, lengths)
    assert found["eval/pairs"] == 2 and found["eval/unscorable_pairs"] == 2
    assert found["eval/accuracy"] == 0.5 and found["eval/score_mean"] == pytest.approx((3 + 2 + 0 + 1) / 4)
    assert by_category(rows, scores, "subset")["y"][0] == 2


def test_by_category() -> None:
    rows = held_out(PAIRS)
    found = by_category(rows, given(rows)[0], "subset")
    assert {name: (count, estimate.value) for name, (count, estimate) in found.items()} == {
        "x": (2, 0.5),
        "y": (2, 0.5),
    }


def labelled(text: str, label: bool) -> Demonstration:
    return Demonstration(Prompt(row_id=0, columns={"label": label}), text)


def test_labelled_text_is_compared_all_with_all() -> None:
    texts = [("good", True, 2.0), ("fine", True, 0.5), ("bad", False, 0.0), ("poor", False, 1.0), ("dull", False, 0.5)]
    pairs = [pair("", "good", "bad"), pair("", "fine", "poor")]  # one of the larger class waits for another epoch
    rows = held_out(pairs, [labelled(text, label) for text, label, _ in texts])
    known = {text: score for text, _, score in texts}
    scores = torch.tensor([known[text] for _, text in rows.items], dtype=torch.float64)
    assert len(scores) == 5
    found = figures(rows, scores, torch.ones(5))
    assert found["eval/auc"] == pytest.approx((3 + 1 + 0 + 0.5) / 6)
    assert found["eval/accuracy"] == 0.5
    paired = figures(held_out(pairs), torch.tensor([2.0, 0.5, 0.0, 1.0]), torch.ones(4))
    assert paired["eval/auc"] == pytest.approx(3 / 4)  # good beats both, fine beats one of two


def test_sections_are_weighted_as_the_benchmark_does() -> None:
    counts = {name: sum(weights.values()) for name, weights in SECTIONS.items()}
    assert counts == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    measured = {
        "math-prm": (447, Estimate(0.9, 0.01)),
        "hep-go": (164, Estimate(0.6, 0.03)),
        "mine": (7, Estimate(0.5, 0.2)),
    }
    found = sections(measured)
    assert set(found) == {"Reasoning", "mine"}
    count, estimate = found["Reasoning"]
    share = 984 / (984 + 164)
    assert count == 611
    assert estimate.value == pytest.approx(share * 0.9 + (1 - share) * 0.6)
    assert estimate.error == pytest.approx(math.hypot(share * 0.01, (1 - share) * 0.03))
    assert sections({"mine": measured["mine"]}) == {}  # another benchmark's rows have no sections
