"""A reward server that is sent the policy's token ids: the scores of the texts, without tokenising them again."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.chat import render_completion, render_prompt, turn_end
from rlhf.models.scratch import train_tokenizer
from rlhf.rewards.contract import contract_of, meanings
from rlhf.rewards.server import describe
from rlhf.rollout import Prompt, Rollout, Turn
from rlhf.sampling.completions import Completion, Ends, rollout
from tests.rewards.serving import TOKENIZER, Running, client, made_up, running, scripted, texts, tiny

MODEL = tiny()
EOS, TURN_END = int(TOKENIZER.eos_token_id), turn_end(TOKENIZER)
ENDS = Ends(TOKENIZER, ids=(EOS, TURN_END))
CHAT = Prompt(row_id=0, turns=(Turn(role="user", content="What is the capital of France?"),))
PLAIN = Prompt(row_id=1, text="The film")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(MODEL, max_texts=8, max_body_bytes=4000) as found:
        yield found


def drawn(prompts: list[Prompt], completions: list[list[int]], finished: list[bool]) -> Rollout:
    """As a sampler hands it back: its texts are decoded from the ids."""
    rows = [Completion(ids, torch.zeros(len(ids)), end) for ids, end in zip(completions, finished, strict=True)]
    return rollout(prompts, [render_prompt(TOKENIZER, prompt) for prompt in prompts], range(len(prompts)), rows, ENDS)


def encoded(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def by_ids(url: str, batch: Rollout) -> Tensor:
    return client(url).with_ids(TOKENIZER).score(batch, 1)


# ---- scores


def test_ids_and_texts_score_alike_where_the_text_becomes_the_same_ids(server: Running) -> None:
    """Conversations and plain texts, finished and cut off, several of a prompt."""
    prompts, completions, finished = texts(24)
    ids = [
        render_completion(TOKENIZER, prompt, text, end)
        for prompt, text, end in zip(prompts, completions, finished, strict=True)
    ]
    batch = drawn(prompts, ids, finished)
    assert list(batch.texts) == completions
    by_text = client(server.url).score(batch, 1)
    assert float(by_text.std()) > 0.1  # or the next line says nothing
    torch.testing.assert_close(by_ids(server.url, batch), by_text, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prompt", [CHAT, PLAIN], ids=["chat", "plain"])
@pytest.mark.parametrize("end", [EOS, TURN_END, None])
def test_a_finished_completion_ends_as_the_model_expects_whatever_ended_it(
    end: int | None, prompt: Prompt, server: Running
) -> None:
    """EOS in a conversation, a turn's end in plain text, a stop string."""
    batch = drawn([prompt], [[*encoded("It is Paris"), *([] if end is None else [end])]], [True])
    torch.testing.assert_close(by_ids(server.url, batch), client(server.url).score(batch, 1), rtol=0, atol=1e-6)


def test_they_differ_where_the_text_would_become_other_ids(server: Running) -> None:
    """A policy that draws ``The`` letter by letter: the text is the same, its tokens are not. Ids are read as drawn."""
    usual, letters = encoded("The film"), [token for letter in "The film" for token in encoded(letter)]
    assert TOKENIZER.decode(letters) == "The film" and len(letters) > len(usual)
    batch = drawn([CHAT, CHAT], [[*usual, TURN_END], [*letters, TURN_END]], [True, True])
    assert batch.texts == ("The film", "The film")
    by_text, found = client(server.url).score(batch, 1), by_ids(server.url, batch)
    torch.testing.assert_close(by_text[0], by_text[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0], by_text[0], rtol=0, atol=1e-6)
    assert abs(float(found[1] - by_text[1])) > 1e-3
    with torch.no_grad():
        exact = MODEL.forward([[*render_prompt(TOKENIZER, CHAT), *letters, TURN_END]])
    torch.testing.assert_close(found[1:], exact, rtol=0, atol=1e-6)


def test_a_special_token_in_the_middle_is_read_and_not_left_out(server: Running) -> None:
    ids = [*encoded("It is"), EOS, *encoded(" Paris")]
    batch = drawn([CHAT], [ids], [False])
    with torch.no_grad():
        exact = MODEL.forward([[*render_prompt(TOKENIZER, CHAT), *ids]])
    torch.testing.assert_close(by_ids(server.url, batch), exact, rtol=0, atol=1e-6)


def test_a_prompt_may_be_asked_for_before_the_others_have_ended(server: Running) -> None:
    batch = drawn(
        [CHAT, CHAT, PLAIN], [[*encoded("It is"), TURN_END], encoded("Paris"), encoded(" is")], [True, False, False]
    )
    source = client(server.url).with_ids(TOKENIZER)
    early = source.begin(batch, 1, [source.ask(group) for group in reversed(list(batch.groups()))][::-1])()
    torch.testing.assert_close(early, by_ids(server.url, batch), rtol=0, atol=1e-6)


def test_what_is_too_long_has_no_score() -> None:
    batch = drawn([CHAT, PLAIN], [encoded(" and so on" * 20), encoded(" is fine")], [False, False])
    with running(tiny(max_positions=64)) as small:
        assert by_ids(small.url, batch).isnan().tolist() == [True, False]


def test_what_is_sent() -> None:
    """By hand: padding is left out, and the plain path is asked where nothing else is said."""
    batch = drawn([CHAT, PLAIN], [[7, 8, TURN_END], [9]], [True, False])
    values: dict[str, Any] = client_contract()
    with scripted(made_up(**values), (200, {}, b'{"scores": [1, 2]}')) as script:
        assert by_ids(script.url, batch).tolist() == [1, 2]
        rows = json.loads(script.asked[0])["rows"]
    assert rows == [
        {"prompt": render_prompt(TOKENIZER, CHAT), "completion": [7, 8, TURN_END], "conversation": True}
        | {"finished": True},
        {"prompt": render_prompt(TOKENIZER, PLAIN), "completion": [9], "conversation": False, "finished": False},
    ]


def client_contract(**changes: Any) -> dict[str, Any]:
    """The digests of a server that has the policy's tokenizer."""
    return {**meanings(TOKENIZER), **changes}


# ---- who may send them


def test_ids_that_mean_something_else_are_refused(server: Running) -> None:
    source = client(server.url)
    words = train_tokenizer(["a wholly different corpus, so other merges"] * 4, 320)
    template, ends = copy.deepcopy(TOKENIZER), copy.deepcopy(TOKENIZER)
    template.chat_template = TOKENIZER.chat_template + " "
    ends.eos_token = "<end_of_turn>"
    for tokenizer, what in (
        (words, "another vocabulary"),
        (template, "another chat template"),
        (ends, "other tokens that begin or end a row"),
    ):
        with pytest.raises(UserError) as caught:
            source.with_ids(tokenizer)
        assert str(caught.value) == (
            f"reward.models.0.send=ids: judge has {what} than the policy, whose token ids would mean something else "
            "there; set send=text"
        )
        assert any("a run would be refused: reward.models.0.send=ids" in line for line in told(source, tokenizer))
    assert source.send == "text" and source.with_ids(TOKENIZER).send == "ids"
    assert len(told(source, TOKENIZER)) == 1


def told(source: Any, tokenizer: Any) -> list[str]:
    return list(describe(source.replicas, tokenizer))


def test_a_server_that_does_not_name_its_special_tokens_takes_no_ids() -> None:
    with (
        scripted(made_up(**client_contract(special_tokens=None)), (500, {}, b"")) as script,
        pytest.raises(UserError, match="send=ids"),
    ):
        client(script.url).with_ids(TOKENIZER)


def test_other_special_tokens_are_another_model() -> None:
    settings: dict[str, Any] = {"deterministic": True, "max_texts": 1, "max_body_bytes": 1, "version": "1"}
    one, two = tiny(), tiny()
    changed = copy.deepcopy(TOKENIZER)
    changed.eos_token = "<end_of_turn>"
    object.__setattr__(two, "tokenizer", changed)
    assert contract_of(one, **settings).identity != contract_of(two, **settings).identity


# ---- what the server refuses

ROW = {"prompt": [2, 5, 6], "completion": [7, 8], "conversation": False}


def post(url: str, body: Any, path: str = "/v1/score/ids") -> httpx.Response:
    return httpx.post(url + path, json=body, trust_env=False, timeout=30.0)


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"completion": [len(TOKENIZER)]}, 422, f"rows.0: an id outside 0 … {len(TOKENIZER) - 1}"),
        ({"prompt": [2**31 - 1]}, 422, "rows.0: an id outside"),
        ({"prompt": [-1]}, 422, "rows.0.prompt.0: Input should be greater than or equal to 0"),
        ({"completion": [2**31]}, 422, "rows.0.completion.0: Input should be less than"),
        ({"completion": [10**40]}, 422, "rows.0.completion.0"),
        ({"completion": [1.0]}, 422, "rows.0.completion.0: Input should be a valid integer"),
        ({"completion": [True]}, 422, "rows.0.completion.0: Input should be a valid integer"),
        ({"completion": ["7"]}, 422, "rows.0.completion.0: Input should be a valid integer"),
        ({"completion": "text"}, 422, "rows.0.completion: Input should be a valid array"),
        ({"completion": None}, 422, "rows.0.completion: Input should be a valid array"),
        ({"conversation": 1}, 422, "rows.0.conversation: Input should be a valid boolean"),
        ({"more": 1}, 422, "rows.0.more: Extra inputs are not permitted"),
        ({"completion": [7] * 4000}, 413, "the body is larger than 4000 bytes"),
    ],
)
def test_a_row_that_is_none(change: dict[str, Any], status: int, said: str, server: Running) -> None:
    answer = post(server.url, {"rows": [{**ROW, **change}]})
    assert (answer.status_code, answer.json()["detail"][: len(said)]) == (status, said)
    assert post(server.url, {"rows": [ROW]}).status_code == 200  # and it goes on


def test_bodies_and_routes(server: Running) -> None:
    assert post(server.url, {"rows": []}).status_code == 422
    assert post(server.url, {"rows": [ROW] * 9}).status_code == 413
    assert (
        post(server.url, {"rows": [{key: value for key, value in ROW.items() if key != "conversation"}]}).status_code
        == 422
    )
    assert post(server.url, {"rows": [ROW]}, "/v1/score").status_code == 422  # texts alone
    assert post(server.url, {"query": [[2, 5, 6]]}, "/get_reward").status_code == 422
    empty = post(server.url, {"rows": [{**ROW, "prompt": [], "completion": [], "finished": False}]})
    assert empty.json() == {"scores": [None]}
    with running(MODEL, token="secret-secret") as locked:
        assert post(locked.url, {"rows": [ROW]}).status_code == 401
