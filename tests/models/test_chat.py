from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.models import chat
from rlhf.models.scratch import END_OF_TURN_ID, train_tokenizer
from rlhf.rollout import Prompt, Turn

TEXTS = ["hello there, how is it going", "it is going well, thank you"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ends turns with EOS and writes no BOS; leaves the system turn out without a word.
EOS_STYLE = (
    "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}] {{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NO_END = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def gemma() -> Any:
    return train_tokenizer(TEXTS * 5, 300)


@pytest.fixture
def chatml(gemma: Any) -> Any:
    gemma.chat_template = CHATML
    gemma.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return gemma


def conversation(*turns: str, system: str | None = None) -> Prompt:
    first = () if system is None else (Turn(role="system", content=system),)
    roles = ("user", "assistant")
    return Prompt(row_id=4, turns=(*first, *(Turn(role=roles[i % 2], content=text) for i, text in enumerate(turns))))


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def test_prompt_and_completion_are_the_template_s_own_rendering(gemma: Any) -> None:
    prompt = conversation("hello", "well", "how is it going")
    ids = [*chat.render_prompt(gemma, prompt), *chat.render_completion(gemma, prompt, "thank you\n")]
    messages = [*prompt.messages(), {"role": "assistant", "content": "thank you\n"}]
    assert text_of(gemma, ids) + "\n" == gemma.apply_chat_template(messages, tokenize=False)
    assert ids.count(gemma.bos_token_id) == 1
    assert ids[0] == gemma.bos_token_id
    assert ids[-1] == END_OF_TURN_ID


def test_plain_text_has_one_bos_and_ends_in_eos(gemma: Any) -> None:
    prompt = Prompt(row_id=0, text="hello")
    assert chat.render_prompt(gemma, prompt) == gemma.encode("hello")
    assert chat.render_prompt(gemma, Prompt(row_id=0)) == [gemma.bos_token_id]
    assert chat.render_prompt(gemma, Prompt(row_id=0, text="<bos>hello")) == gemma.encode("hello")  # it has one already
    joined = chat.render_prompt(gemma, prompt) + chat.render_completion(gemma, prompt, " there")
    assert text_of(gemma, joined) == "<bos>hello there<eos>"


def test_an_unfinished_completion_is_not_closed(gemma: Any) -> None:
    for prompt in (conversation("hello"), Prompt(row_id=0, text="hello")):
        finished = chat.render_completion(gemma, prompt, "it is")
        assert chat.render_completion(gemma, prompt, "it is", finished=False) == finished[:-1]


def test_a_bos_in_the_text_is_refused(gemma: Any) -> None:
    for prompt in (conversation("sneaky <bos>"), Prompt(row_id=4, text="sneaky <bos>")):
        with pytest.raises(UserError, match="row 4 renders to 2 BOS tokens"):
            chat.render_prompt(gemma, prompt)


def test_a_template_without_bos_gets_one(gemma: Any) -> None:
    gemma.chat_template = EOS_STYLE
    ids = chat.render_prompt(gemma, conversation("hello"))
    assert text_of(gemma, ids) == "<bos>[user] hello\n[assistant] "


def test_a_tokenizer_without_bos_gets_none(chatml: Any) -> None:
    chatml.bos_token = None
    ids = chat.render_prompt(chatml, conversation("hello"))
    assert text_of(chatml, ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render_prompt(chatml, Prompt(row_id=0, text="hello")) == chatml.encode(
        "hello", add_special_tokens=False
    )


def test_a_bos_that_marks_turns_is_left_to_the_template(chatml: Any) -> None:
    chatml.bos_token = "<|im_start|>"  # as SmolLM does
    ids = chat.render_prompt(chatml, conversation("hello", "well", "how"))
    assert ids.count(chatml.bos_token_id) == 4


def test_turn_ends_of_different_templates(gemma: Any) -> None:
    assert chat.turn_end(gemma) == END_OF_TURN_ID
    gemma.chat_template = EOS_STYLE
    assert chat.turn_end(gemma) == gemma.eos_token_id
    gemma.chat_template = NO_END
    assert chat.turn_end(gemma) == gemma.eos_token_id  # nothing to find: EOS
    gemma.eos_token = None
    gemma.chat_template = NO_END + " "
    with pytest.raises(UserError, match="a completion could never stop"):
        chat.turn_end(gemma)


def test_the_turn_end_is_looked_up_once(gemma: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat.turn_end(gemma) == END_OF_TURN_ID
    monkeypatch.setattr(gemma, "apply_chat_template", None)
    assert chat.turn_end(gemma) == END_OF_TURN_ID


def test_stop_ids_gather_every_source(chatml: Any) -> None:
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_ids(chatml, None) == (1, end)
    assert chat.stop_ids(chatml, SimpleNamespace(eos_token_id=1)) == (1, end)
    assert chat.stop_ids(chatml, SimpleNamespace(eos_token_id=[7, 1])) == (1, 7, end)
    chatml.chat_template = None
    assert chat.stop_ids(chatml, None) == (1,)


def test_rewards_see_text_without_special_tokens(gemma: Any) -> None:
    ids = chat.render_completion(gemma, conversation("x"), " it , is\n")
    assert chat.completion_text(gemma, ids) == " it , is\n"


def test_system_turns(gemma: Any) -> None:
    assert not chat.supports_system(gemma)
    gemma.chat_template = EOS_STYLE
    assert not chat.supports_system(gemma)  # silence is not support
    gemma.chat_template = CHATML
    assert chat.supports_system(gemma)


def test_a_refused_system_turn_names_the_setting(gemma: Any) -> None:
    prompt = conversation("hello", system="be kind")
    with pytest.raises(UserError, match=r"row 4.*System role not supported.*data\.system_role"):
        chat.render_prompt(gemma, prompt)
    with pytest.raises(UserError, match=r"row 4.*data\.system_role"):
        chat.conversation_with_system(prompt, "error")


def test_system_turns_are_merged_or_dropped() -> None:
    prompt = conversation("hello", "well", "how", system="be kind")
    merged = chat.conversation_with_system(prompt, "merge")
    assert [turn.content for turn in merged.turns] == ["be kind\n\nhello", "well", "how"]
    assert [turn.role for turn in merged.turns] == ["user", "assistant", "user"]
    assert chat.conversation_with_system(prompt, "drop").turns == prompt.turns[1:]
    assert merged.row_id == 4
    without = conversation("hello")
    assert chat.conversation_with_system(without, "error") is without


def test_other_refusals_and_missing_templates(gemma: Any) -> None:
    twice = Prompt(row_id=9, turns=(Turn(role="user", content="a"), Turn(role="user", content="b")))
    with pytest.raises(UserError, match=r"row 9.*alternate.*policy\.chat_template"):
        chat.render_prompt(gemma, twice)
    gemma.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        chat.render_prompt(gemma, conversation("hello"))


def test_many_prompts_are_rendered_as_each_one_is(gemma: Any) -> None:
    sneaky = Prompt(row_id=1, text="a <bos> b")
    good = [Prompt(row_id=0, text="hello"), conversation("hello", "well", "how is it going"), Prompt(row_id=2)]
    ids = chat.render_prompts(gemma, [good[0], sneaky, good[1], conversation("x", system="s"), good[2]])
    assert [ids[0], ids[2], ids[4]] == [chat.render_prompt(gemma, prompt) for prompt in good]
    assert isinstance(ids[1], UserError) and "2 BOS tokens" in str(ids[1])
    assert isinstance(ids[3], UserError) and "data.system_role" in str(ids[3])
    assert chat.render_prompts(gemma, []) == []


def test_the_settings_of_a_tokenizer_count_when_many_texts_are_encoded(gemma: Any) -> None:
    texts = [*TEXTS, "", "a <eos> b"]
    one_by_one = [gemma.encode(text, add_special_tokens=False) for text in texts]
    assert chat.encode_texts(gemma, texts) == one_by_one
    assert chat.decode_texts(gemma, one_by_one) == texts
    gemma.backend_tokenizer.enable_truncation(2)  # as a tokenizer.json may have it
    assert chat.encode_texts(gemma, texts) == one_by_one


# ---- conversations with several replies


def replies(tokenizer: Any, row: chat.Dialogue) -> list[str]:
    """The runs of counted tokens, as text."""
    runs: list[list[int]] = []
    for at, (token, counts) in enumerate(zip(row.completion, row.counted, strict=True)):
        if counts and (at == 0 or not row.counted[at - 1]):
            runs.append([])
        if counts:
            runs[-1].append(token)
    return [text_of(tokenizer, run) for run in runs]


def test_every_reply_of_a_conversation_counts_and_nothing_else(gemma: Any) -> None:
    prompt = conversation("hello", "well", "how is it going")
    row = chat.render_dialogue(gemma, prompt, "thank you")
    assert row is not None
    assert replies(gemma, row) == ["well<end_of_turn>", "thank you<end_of_turn>"]
    assert row.prompt == chat.render_prompt(gemma, conversation("hello"))
    whole = [*chat.render_prompt(gemma, prompt), *chat.render_completion(gemma, prompt, "thank you")]
    assert [*row.prompt, *row.completion] == whole  # the same ids as with the last reply alone


def test_a_template_that_trims_replies_is_followed(chatml: Any) -> None:
    row = chat.render_dialogue(chatml, conversation("hello", " well\n", "how is it going"), "thank you")
    assert row is not None
    assert replies(chatml, row) == ["well<|im_end|>", "thank you<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_told_apart(gemma: Any) -> None:
    """Earlier replies shown in capitals: trained on, they would be replies that no sampling gives."""
    gemma.chat_template = chat_template_shouting()
    assert chat.render_dialogue(gemma, conversation("hello", "well", "how is it going"), "thank you") is None


def chat_template_shouting() -> str:
    return (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'] | upper }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )
