"""A reward model behind HTTP scores as it does here, whatever happens on the way; or the run ends with one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rlhf.errors import ExitCode, UserError
from rlhf.models.chat import render_completion, render_prompt
from rlhf.rewards.contract import IDENTITY_HEADER
from rlhf.rewards.replicas import Replicas
from rlhf.rewards.server import ServerReward, _parts, _text_rows, describe
from rlhf.rollout import Prompt, Rollout
from tests.rewards.serving import TOKENIZER, Answer, Running, client, made_up, running, scripted, texts, tiny

MODEL = tiny()
TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(MODEL, token=TOKEN) as found:
        yield found


def rollout(rows: int) -> Rollout:
    prompts, completions, finished = texts(rows)
    return Rollout.from_ids(
        [render_prompt(TOKENIZER, prompt) for prompt in prompts],
        [render_completion(TOKENIZER, p, text) for p, text in zip(prompts, completions, strict=True)],
        prompts=tuple(prompts),
        texts=tuple(completions),
        sample=torch.arange(rows) % 4,
        finished=torch.tensor(finished),
    )


def numbers(*values: float | None) -> Answer:
    return 200, {}, json.dumps({"scores": values}).encode()


def as_many(body: bytes) -> Answer:
    """Each completion's number: `` is 7 wonders`` scores 7."""
    return numbers(*(float(row["completion"].split()[1]) for row in json.loads(body)["rows"]))


# ---- scores


def test_scores_are_those_of_the_model_here(server: Running) -> None:
    batch = rollout(48)
    source = client(server.url, token=TOKEN)
    assert source.name == "judge"
    scores, local = source.score(batch, 1), MODEL.score(batch, 1)
    assert scores.dtype == torch.float32 and float(local.std()) > 0.1  # or the next line says nothing
    torch.testing.assert_close(scores, local, rtol=0, atol=1e-6)  # sums over rows of other widths
    assert torch.equal(source.score(batch, 2), scores)  # the same requests, so the same forwards


@pytest.mark.parametrize("deterministic", [True, False])
def test_sixty_four_clients_lose_nothing(deterministic: bool) -> None:
    prompts, completions, finished = texts(1024)
    expected = MODEL.score_texts(prompts, completions, finished)
    with running(MODEL, deterministic=deterministic) as server, ThreadPoolExecutor(64) as pool:
        source = client(server.url, give_up_seconds=60.0)

        def ask(part: int) -> list[float]:
            rows = slice(part * 16, (part + 1) * 16)
            return source.score_texts(prompts[rows], completions[rows], finished[rows])

        found = torch.tensor([score for part in pool.map(ask, range(64)) for score in part])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow  # ten seconds: ten thousand texts through a tiny model
def test_ten_thousand_texts_keep_their_order(server: Running) -> None:
    given = texts(10_000)
    found = torch.tensor(client(server.url, token=TOKEN, give_up_seconds=300.0).score_texts(*given))
    torch.testing.assert_close(found, MODEL.score_texts(*given), rtol=0, atol=1e-6)


def test_scores_do_not_depend_on_who_else_asks(server: Running) -> None:
    """To the last bit, with forwards of its own for every request."""
    source, batch = client(server.url, token=TOKEN), texts(40)
    alone = source.score_texts(*batch)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(source.score_texts, *texts(8 * rows)) for rows in range(1, 5)]
        assert source.score_texts(*batch) == alone
        assert all(len(other.result()) for other in others)


def test_what_is_too_long_has_no_score() -> None:
    small = tiny(max_positions=64)
    prompts, completions, finished = texts(6)
    completions[2] = " and so on" * 20
    with running(small) as server:
        scores = client(server.url).score_texts(prompts, completions, finished)
    assert [math.isnan(score) for score in scores] == [False, False, True, False, False, False]


def test_a_rollout_of_nothing() -> None:
    with scripted(made_up()) as script:
        assert client(script.url).score_texts([], [], []) == [] and not script.asked


# ---- requests


def test_requests_keep_a_prompt_together_and_below_every_limit() -> None:
    """By hand: 30 rows of 4 a prompt, at most 10 a request, so two prompts each; then three rows by their bytes."""
    given = texts(30)
    parts = list(_parts(given[0], _text_rows(*given), made_up(max_texts=10)))
    assert [rows for _, rows in parts] == [8, 8, 8, 6]
    assert [len(json.loads(body)["rows"]) for body, _ in parts] == [8, 8, 8, 6]
    prompts = [Prompt(row_id=0, text="x")] * 5
    by_bytes = list(_parts(prompts, _text_rows(prompts, ["é" * 40] * 5, [True] * 5), made_up(max_body_bytes=400)))
    assert [rows for _, rows in by_bytes] == [3, 2] or [rows for _, rows in by_bytes] == [2, 2, 1]
    assert all(len(body) <= 400 for body, _ in by_bytes)


def test_what_is_sent_is_text_and_what_ended() -> None:
    prompts, completions, finished = texts(5)
    with scripted(made_up(), as_many) as script:
        assert client(script.url).score_texts(prompts, completions, finished) == [0, 1, 2, 3, 4]
    rows = json.loads(script.asked[0])["rows"]
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "Is it 0?"}],
        "completion": " is 0 wonders",
        "finished": False,
    }
    assert rows[4] == {"prompt": "The film 4", "completion": " is 4 wonders", "finished": True}


# ---- servers that fail


@pytest.mark.parametrize(
    "failure",
    [(500, {}, b"x"), (503, {"retry-after": "0"}, b""), (429, {}, b'{"detail": "busy"}'), (502, {}, b""), (0, {}, b"")],
    ids=["500", "503", "429", "502", "cut"],
)
def test_what_may_pass_is_tried_again(failure: Answer) -> None:
    with scripted(made_up(), failure, failure, as_many) as script:
        assert client(script.url).score_texts(*texts(3)) == [0, 1, 2]
        assert len(script.asked) == 3 and len(set(script.asked)) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((400, {}, b'{"detail": "no such thing"}'), "refuses with 400: no such thing"),
        ((401, {}, b""), "401: nothing more; name the variable that holds its token in token_env"),
        ((404, {}, b"<html>lost</html>"), r"404: <html>lost</html>; is it `rlhf serve-reward`\?"),
        ((413, {}, b'{"detail": "too large"}'), "413: too large"),
        ((422, {}, b'{"detail": "rows.0: odd"}'), "422: rows.0: odd"),
        ((302, {"location": "http://127.0.0.1:9/"}, b""), "302: nothing more; redirects are not followed"),
    ],
)
def test_what_will_not_pass_is_not(answer: Answer, said: str) -> None:
    with scripted(made_up(), answer) as script:
        with pytest.raises(UserError, match=said) as info:
            client(script.url).score_texts(*texts(3))
        assert len(script.asked) == 1
    assert info.value.code == ExitCode.USER and str(info.value).startswith(f"reward.models.0.url: {script.url} ")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"scores": [1.0, 2.0]}', "2 scores for 3 completions"),
        (b'{"scores": [1.0, 2.0, 3.0, 4.0]}', "4 scores for 3 completions"),
        (b'{"scores": []}', "0 scores for 3 completions"),
        (b'{"scores": 1.0}', "without a list of scores"),
        (b'{"rewards": [1, 2, 3]}', "without a list of scores"),
        (b"[1, 2, 3]", "without a list of scores"),
        (b'{"scores": [1, 2, NaN]}', "not JSON"),
        (b'{"scores": [1, 2, Infinity]}', "not JSON"),
        (b'{"scores": [1, 2, 1e999]}', "neither a finite number nor null"),
        (b'{"scores": [1, 2, 1' + b"0" * 400 + b"]}", "neither a finite number nor null"),
        (b'{"scores": [1, 2, 1e39]}', "neither a finite number nor null"),
        (b'{"scores": [1, 2, "0.5"]}', "neither a finite number nor null"),
        (b'{"scores": [1, 2, true]}', "neither a finite number nor null"),
        (b'{"scores": [1, 2, [3]]}', "neither a finite number nor null"),
        (b"", "not JSON"),
        (b"<html>welcome</html>", "not JSON: <html>welcome</html>"),
        (b"[" * (4 * 2**20 + 1), "which no scores are"),
    ],
    ids=range(17),
)
def test_an_answer_that_is_no_answer_ends_the_run(body: bytes, said: str) -> None:
    with scripted(made_up(), (200, {}, body)) as script:
        with pytest.raises(UserError, match=said) as info:
            client(script.url).score_texts(*texts(3))
        assert len(script.asked) == 1 and info.value.code == ExitCode.REWARD_GONE


def test_null_is_nan_and_never_zero() -> None:
    with scripted(made_up(), numbers(1.5, None, -2)) as script:
        scores = client(script.url).score(rollout(3))
    assert scores[[0, 2]].tolist() == [1.5, -2.0] and bool(scores[1].isnan())


def test_a_server_that_stays_away_ends_the_run() -> None:
    told: list[str] = []
    with scripted(made_up(), (503, {}, b'{"detail": "resting"}')) as script:
        source = client(script.url, give_up_seconds=0.3, note=told.append)
        with pytest.raises(
            UserError, match=r"no reward from .* for 0.3 seconds; the last answer: .* 503: resting"
        ) as info:
            source.score_texts(*texts(3))
    assert info.value.code == ExitCode.REWARD_GONE and "\n" not in str(info.value)
    assert len(told) == 1 and "503: resting; trying on for up to 0.3 seconds" in told[0]
    with pytest.raises(UserError, match="Connect") as info:  # and at the start
        client(script.url, seconds=0.1)
    assert info.value.code == ExitCode.REWARD_GONE


def test_another_model_in_its_place_ends_the_run() -> None:
    with running(MODEL) as server:
        source = client(server.url)
        before = source.score_texts(*texts(3))
        port = int(server.url.rpartition(":")[2])
    with (
        running(tiny(seed=2), port=port),
        pytest.raises(UserError, match="now serves another model than judge") as info,
    ):
        source.score_texts(*texts(3))
    assert info.value.code == ExitCode.REWARD_GONE
    with running(MODEL, port=port):  # the first one comes back, on connections that were cut
        assert source.score_texts(*texts(3)) == before


def test_an_answer_without_an_identity_is_refused() -> None:
    nameless: Answer = (200, {IDENTITY_HEADER: ""}, b'{"scores": [1]}')
    with scripted(made_up(), nameless) as script, pytest.raises(UserError, match="another model"):
        client(script.url).score_texts(*texts(1))


# ---- several servers


def test_replicas_share_the_work_and_keep_its_order() -> None:
    with scripted(made_up(), as_many) as one, scripted(made_up(), as_many) as two:
        found = client(one.url, two.url).score_texts(*texts(640))
    assert found == list(range(640))
    assert len(one.asked) == len(two.asked) == 5  # ten requests of 64 rows


def test_a_dead_replicas_work_goes_to_the_others() -> None:
    told: list[str] = []
    with scripted(made_up(), as_many) as one:
        with scripted(made_up(), as_many) as two:
            source = client(one.url, two.url, note=told.append)
        assert source.score_texts(*texts(640)) == list(range(640))
        assert len(one.asked) == 10 and len(told) == 1 and two.url in told[0]


def test_a_replica_that_is_away_at_the_start_may_come_later() -> None:
    with scripted(made_up(), as_many) as one:
        with scripted(made_up(), as_many) as two:
            pass
        assert client(two.url, one.url).score_texts(*texts(3)) == [0, 1, 2]


def test_replicas_hold_one_model() -> None:
    other = made_up(identity="1" * 64, name="other")
    said = r"holds made-up and .* holds other, two different models"
    with scripted(made_up()) as one, scripted(other) as two, pytest.raises(UserError, match=said):
        client(one.url, two.url)


def test_a_failure_of_one_rank_is_everybodys() -> None:
    mine, theirs = made_up(), UserError("gone", ExitCode.REWARD_GONE)
    with scripted(mine, as_many) as script:
        source = client(script.url)
        shared = ServerReward(contract=mine, replicas=source.replicas, gather=lambda own: [own, theirs])
        with pytest.raises(UserError, match="gone"):
            shared.score(rollout(3))


# ---- secrets


def test_a_token_is_asked_for_and_shown_nowhere(server: Running) -> None:
    assert len(client(server.url, token=TOKEN).score_texts(*texts(2))) == 2
    for token in (None, "wrong", TOKEN + "x"):
        with pytest.raises(UserError, match="refuses with 401: no token, or not this server's"):
            client(server.url, token=token)
    with scripted(made_up(), (400, {}, f"you sent {TOKEN}".encode())) as script:
        source = client(script.url, token=TOKEN)
        with pytest.raises(UserError) as info:
            source.score_texts(*texts(1))
    assert "you sent [redacted]" in str(info.value) and TOKEN not in repr(source)


def test_what_a_server_holds_is_described_or_why_not(server: Running) -> None:
    def told(token: str | None, url: str = server.url) -> list[str]:
        return list(describe(Replicas(key="reward.models.0.url", urls=(url,), token=token, give_up_seconds=2.0)))

    assert told(TOKEN) == [
        f"reward.models.0.url: {server.url} holds judge (float32, deterministic, 2048 tokens at most)"
    ]
    (refused,), (away,) = told(None), told(None, "http://127.0.0.1:9")
    assert "401" in refused and "not asked what it holds" in away
