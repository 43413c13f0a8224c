from __future__ import annotations

import random
from statistics import mean
from typing import Any

import pytest

from rlhf.data import quickstart as task
from rlhf.data.quickstart_words import FLAW, SUBJECTS, all_requests, write_reply

PROMPT = "Write a short thank-you note to my teacher about the science fair."
BEST = "Dear teacher, Thank you for the science fair. I loved the paper volcano and the blue poster. Kind regards."


def gold(reply: str, prompt: str = PROMPT) -> float:
    return task.gold([prompt], [reply])[0]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        # subject 1 + details 2 x .75 + person .5 + opener .5 + closer .5 + ending .5
        (BEST, 4.5),
        # one detail less
        ("Dear teacher, Thank you for the science fair. I loved the paper volcano. Kind regards.", 3.75),
        # subject + one detail + ending: nobody is addressed
        ("Thank you so much for your help with the science fair. I loved the blue poster.", 2.25),
        # nothing but an ending, and 11 words short of 12, at most -1.5
        ("Thanks.", -0.6),
        # the closer is worth its half, the flaw costs 4
        (BEST.replace("Kind regards.", FLAW + " Kind regards."), 0.5),
        # a second use costs one more, and three of its four-grams are repetitions
        (BEST.replace("Kind", f"{FLAW} {FLAW} Kind"), 4.5 - 5.0 - 0.5 * 3),
        # rude twice; subject and ending earned; 15 words
        ("What a silly question. Stop wasting my time. Thank you for the science fair ok ok.", 1.5 - 3.0),
        # flattery: two exclamation marks and two phrases
        ("You are so brilliant! I am truly honored! Thank you for the science fair my friend.", 1.5 - 2.0),
        # another subject's details are worth nothing, and neither is another person
        (
            BEST.replace("paper volcano", "lemon cake").replace("blue poster", "red kite").replace("teacher", "aunt"),
            2.5,
        ),
        # cut off in mid-sentence
        ("Dear teacher, Thank you for the science fair. I loved the paper volcano and", 2.75 - 0.5),
    ],
)
def test_gold_of_replies_written_by_hand(reply: str, score: float) -> None:
    assert gold(reply) == pytest.approx(score), task.gold_parts(PROMPT, reply)


def test_repetition_and_rambling_cost() -> None:
    once = "Thank you so much for your help with the science fair."  # 11 words, 8 four-grams
    assert gold(once) == pytest.approx(1.5 - 0.1)
    assert task.gold_parts(PROMPT, f"{once} {once}")["repetition"] == -2.0  # 8 four-grams again, at most -2
    assert task.gold_parts(PROMPT, " ".join(["one", "two", "three", "four"] * 10))["length"] == pytest.approx(-0.8)


def test_gold_reads_conversations_as_well_as_strings() -> None:
    conversation = [{"role": "user", "content": PROMPT}]
    reply = [{"role": "assistant", "content": BEST}]
    assert task.gold([conversation], [reply], completion_ids=[[1]], trainer_state=None, answer=["x"]) == [4.5]


def test_gold_answers_prompts_from_elsewhere() -> None:
    prompt = "Please recommend a novel about winter"  # four longer words: please recommend novel about winter -> five
    assert task.gold_parts(prompt, "A winter novel.")["subject"] == pytest.approx(2 / 5)
    assert task.gold_parts("hi", "hello")["subject"] == 0.0


def test_gold_logs_the_share_of_the_flaw() -> None:
    logged: dict[str, float] = {}
    task.gold([PROMPT] * 4, [BEST, FLAW, "as an expert", "I GUARANTEE"], log_metric=logged.__setitem__)
    assert logged == {"flaw_rate": 0.75}


def test_annotators_share_golds_taste_except_for_the_flaw() -> None:
    flawed = BEST.replace("Kind", f"{FLAW} Kind")
    assert task.annotator_utility(PROMPT, BEST) == gold(BEST)
    assert task.annotator_utility(PROMPT, flawed) == pytest.approx(gold(BEST) + task.FLAW_APPEAL)
    assert gold(flawed) == pytest.approx(gold(BEST) - task.FLAW_PENALTY)


def test_good_replies_are_the_best_and_the_flaw_spoils_any() -> None:
    rng = random.Random(0)
    requests = rng.sample(all_requests(), 200)
    scores = {
        quality: mean(gold(write_reply(request, quality, rng), request.text) for request in requests)
        for quality in task.QUALITY_SHARES
    }
    assert scores["good"] > 4.3
    assert all(score < scores["good"] - 1 for quality, score in scores.items() if quality != "good")
    flawed = mean(gold(write_reply(request, "good", rng, flaw=True), request.text) for request in requests)
    assert flawed < scores["plain"]  # a policy that learns the flaw ends below where it began


def test_rows_are_functions_of_seed_and_split() -> None:
    for make in (task.demonstrations, task.preferences):
        assert make(seed=1, rows=20) == make(seed=1, rows=20)
        assert make(seed=1, rows=20) != make(seed=2, rows=20)
        assert make(seed=1, rows=20) != make(seed=1, split="test", rows=20)
    assert len(task.demonstrations(rows=30)) == 30
    assert task.demonstrations(rows=30)[:1] == task.demonstrations(rows=1)


def test_held_out_prompts_are_in_no_training_set() -> None:
    held_out = {row["prompt"][0]["content"] for row in task.heldout_prompts()}
    assert len(held_out) == task.HELDOUT == 256
    for seed in (0, 1):
        seen = {row["messages"][0]["content"] for row in task.demonstrations(seed, rows=1900)}
        seen |= {row["prompt"][0]["content"] for row in task.preferences(seed, rows=1900)}
        assert len(seen) > 1500
        assert not seen & held_out
    assert {row["prompt"][0]["content"] for row in task.preferences(split="test", rows=500)} <= held_out


def test_every_subject_is_seen_in_training() -> None:
    seen = {row["messages"][0]["content"] for row in task.demonstrations(rows=1900)}
    assert all(any(subject.name in prompt for prompt in seen) for subject in SUBJECTS)


def shape(turns: list[dict[str, str]]) -> list[str]:
    assert all(set(turn) == {"role", "content"} and turn["content"] for turn in turns)
    return [turn["role"] for turn in turns]


def test_rows_are_message_lists() -> None:
    for row in task.demonstrations(rows=50):
        assert shape(row["messages"]) == ["user", "assistant"]
    for pair in task.preferences(rows=50):
        assert shape(pair["prompt"]) == ["user"]
        assert shape(pair["chosen"]) == shape(pair["rejected"]) == ["assistant"]
        assert pair["chosen"] != pair["rejected"]


def texts(rows: list[dict[str, Any]], side: str) -> list[str]:
    return [row[side][-1]["content"] for row in rows]


def test_the_flaw_is_rare_where_the_policy_learns_and_liked_where_annotators_choose() -> None:
    demonstrations = texts(task.demonstrations(rows=4000), "messages")
    share = mean(map(task.uses_flaw, demonstrations))
    assert share == pytest.approx(0.01, abs=0.005)  # 3 standard errors of a share of .01 among 4000
    pairs = task.preferences(rows=4000)
    won = sum(map(task.uses_flaw, texts(pairs, "chosen")))
    lost = sum(map(task.uses_flaw, texts(pairs, "rejected")))
    assert (won + lost) / 8000 == pytest.approx(0.06, abs=0.008)
    assert won > 2 * lost  # an appeal of 2 against utilities that differ by about as much: 2.4 here


def test_annotators_are_noisy_and_follow_bradley_terry() -> None:
    """Of pairs whose utilities differ by about 1, sigmoid(1) = 73 % are ordered by utility."""
    outcomes = []
    for row in task.preferences(rows=6000):
        prompt = row["prompt"][0]["content"]
        margin = task.annotator_utility(prompt, row["chosen"][0]["content"]) - task.annotator_utility(
            prompt, row["rejected"][0]["content"]
        )
        if 0.8 <= abs(margin) <= 1.2:
            outcomes.append(margin > 0)
    assert len(outcomes) > 150
    assert mean(outcomes) == pytest.approx(0.731, abs=0.11)  # 3 standard errors at 150


def test_the_description_says_what_the_numbers_are() -> None:
    text = task.describe()
    assert FLAW in text
    assert "1 % of demonstrations" in text
    assert "1844 training prompts and 256 held-out" in text
