"""Between conversations and token ids: the only place that reads a tokenizer's chat template.

Everything is rendered as text and encoded with ``add_special_tokens=False``: templates write their own BOS, and a
tokenizer that adds a second one shifts every position the model was trained on without any error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from jinja2.exceptions import TemplateError

from rlhf.errors import UserError
from rlhf.rollout import Prompt, Turn

SystemRole = Literal["error", "merge", "drop"]
P = ParamSpec("P")
T = TypeVar("T")

_PROBE = "probe0text"  # one word, so that a template which trims or reflows a turn still shows it whole


def render_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids that a completion is conditioned on: a rendered conversation with its generation prompt, or BOS + text.

    Exactly one BOS, in front, when the tokenizer has one. Raises UserError when the tokenizer has no chat template,
    when the template refuses the conversation (a system turn: names ``data.system_role``), and when a text smuggles in
    a BOS.
    """
    return _one_bos(tokenizer, _encode(tokenizer, _written(tokenizer, prompt)), prompt)


def render_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int] | UserError]:
    """``render_prompt`` of many prompts, tokenised together, which is several times faster; the error in the place of
    a prompt that cannot be rendered."""
    written = [_or_error(_written, tokenizer, prompt) for prompt in prompts]
    ids = iter(encode_texts(tokenizer, [text for text in written if isinstance(text, str)]))
    return [
        text if isinstance(text, UserError) else _or_error(_one_bos, tokenizer, next(ids), prompt)
        for text, prompt in zip(written, prompts, strict=True)
    ]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text on its own, without special tokens: ``tokenizer.encode`` of each, in one call of the Rust
    tokenizer where there is one. It is asked directly, because the wrapper around it doubles the time."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if (
        backend is None
        or backend.truncation is not None
        or backend.padding is not None
        or getattr(tokenizer, "split_special_tokens", False)
    ):
        return [_encode(tokenizer, text) for text in texts]
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def decode_texts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """The text of each row of ids, special tokens and spaces as they are; in one call like ``encode_texts``."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) for ids in rows]
    found: list[str] = backend.decode_batch([list(ids) for ids in rows], skip_special_tokens=False)
    return found


def render_completion(tokenizer: Any, prompt: Prompt, completion: str, finished: bool = True) -> list[int]:
    """Ids that follow ``render_prompt``'s: the completion's own tokens and, when ``finished``, the token that ends it
    (the template's turn end for a conversation, EOS for plain text). The text is tokenised on its own: it never merges
    with the prompt, as in sampling."""
    ids = _encode(tokenizer, completion)
    return [*ids, completion_end(tokenizer, prompt.conversational)] if finished else ids


def completion_end(tokenizer: Any, conversational: bool) -> int:
    """The id that ends a completion: the template's turn end for a conversation, EOS for plain text. Raises UserError
    where there is none."""
    if conversational:
        return turn_end(tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{_name(tokenizer)} has no EOS token, so a plain-text completion has no end; set its eos_token"
        )
    return int(tokenizer.eos_token_id)


def drawn_completion(
    tokenizer: Any, special: frozenset[int], ids: Sequence[int], conversational: bool, finished: bool
) -> list[int]:
    """Ids that a policy drew, as ``render_completion`` ends them: where it is ``finished``, a special token that stands
    last is the one that ended it, and ``completion_end``'s takes its place. special: ``special_ids``. Nothing else is
    changed."""
    if not finished:
        return list(ids)
    drawn = ids[:-1] if ids and ids[-1] in special else ids
    return [*drawn, completion_end(tokenizer, conversational)]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Every id that stands for no text of its own."""
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return frozenset({*tokenizer.all_special_ids} | added)


class Dialogue(NamedTuple):
    """A conversation as one row: the ids up to the first reply, what follows, and which of those are replies."""

    prompt: list[int]
    completion: list[int]
    counted: list[bool]


def render_dialogue(tokenizer: Any, prompt: Prompt, completion: str) -> Dialogue | None:
    """Every assistant turn of the conversation as something to imitate, each tokenised as in sampling.

    ``counted`` is True for the tokens of assistant turns, their end token included, and False for what the template and
    the other turns add between them. None where the template shows an earlier turn otherwise once later ones follow
    (templates that drop old reasoning do): then only the last reply can be learned as it is sampled.
    """
    turns = [*prompt.messages(), {"role": "assistant", "content": completion}]
    replies = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    first = render_prompt(tokenizer, replace(prompt, turns=prompt.turns[: replies[0]]))
    ids: list[int] = []
    counted: list[bool] = []
    shown = _render(tokenizer, turns[: replies[0]], generation_prompt=True, row_id=prompt.row_id)
    for reply, following in zip(replies, [*replies[1:], None], strict=True):
        text, longer = turns[reply]["content"], shown
        if following is not None:
            longer = _render(tokenizer, turns[:following], generation_prompt=True, row_id=prompt.row_id)
            if not longer.startswith(shown + text):
                text = text.strip()  # templates may trim a turn
        own = [*_encode(tokenizer, text), turn_end(tokenizer)]
        ids, counted = ids + own, counted + [True] * len(own)
        if following is not None:
            between = _encode(tokenizer, longer.removeprefix(shown + text))
            if not longer.startswith(shown + text) or between[:1] != own[-1:]:
                return None
            ids, counted, shown = ids + between[1:], counted + [False] * (len(between) - 1), longer
    return Dialogue(first, ids, counted)


def turn_end(tokenizer: Any) -> int:
    """The id that ends an assistant turn: the first special token that the template writes after the turn's text, EOS
    when it writes none. Found once per tokenizer and template."""
    return _template(tokenizer).turn_end


def stop_ids(tokenizer: Any, generation_config: Any | None) -> tuple[int, ...]:
    """Every id that ends a completion: EOS of the tokenizer and of the generation config, and the template's turn end.

    Gemma's turns end in ``<end_of_turn>``, not in ``<eos>``; without both, every sample runs to its maximal length.
    """
    found: list[int] = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    configured = getattr(generation_config, "eos_token_id", None)
    if configured is not None:
        found += [configured] if isinstance(configured, int) else [int(token) for token in configured]
    if getattr(tokenizer, "chat_template", None):
        found.append(turn_end(tokenizer))
    return tuple(dict.fromkeys(found))


def completion_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The completion as reward functions see it: decoded, special tokens dropped, spaces left alone."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def supports_system(tokenizer: Any) -> bool:
    """True when the template shows a system turn to the model; False when it raises (Gemma 1, 2) or omits it.

    Without a template nothing is known against it: rendering says what is missing.
    """
    if not getattr(tokenizer, "chat_template", None):
        return True
    messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "hello"}]
    try:
        return _PROBE in tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return False


def conversation_with_system(prompt: Prompt, system_role: SystemRole) -> Prompt:
    """The prompt without system turns: put in front of the first user turn (``merge``) or left out (``drop``).

    A prompt that has none is returned as it is. ``error`` raises UserError naming ``data.system_role``.
    """
    system = [turn.content for turn in prompt.turns if turn.role == "system"]
    if not system:
        return prompt
    if system_role == "error":
        raise UserError(
            f"row {prompt.row_id} has a system turn and the chat template has no system role; "
            "set data.system_role to merge (into the first user turn) or drop"
        )
    others = [turn for turn in prompt.turns if turn.role != "system"]
    if system_role == "merge" and others:
        others[0] = Turn(role=others[0].role, content="\n\n".join([*system, others[0].content]))
    return replace(prompt, turns=tuple(others))


@dataclass(frozen=True)
class _Template:
    """What rendering probes showed. ``bos_marks_turns``: the template writes one BOS per turn, and means it."""

    source: str
    turn_end: int
    bos_marks_turns: bool


_TEMPLATES: WeakKeyDictionary[Any, _Template] = WeakKeyDictionary()


def _template(tokenizer: Any) -> _Template:
    source = str(getattr(tokenizer, "chat_template", None))
    known = _TEMPLATES.get(tokenizer)
    if known is None or known.source != source:
        known = _TEMPLATES[tokenizer] = _probe(tokenizer, source)
    return known


def _probe(tokenizer: Any, source: str) -> _Template:
    question, answer = {"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE}
    tail = _render(tokenizer, [question, answer], generation_prompt=False).rpartition(_PROBE)[2]
    special = special_ids(tokenizer)
    end = next((token for token in _encode(tokenizer, tail) if token in special), tokenizer.eos_token_id)
    if end is None:
        raise UserError(
            f"the chat template of {_name(tokenizer)} ends a turn with {tail!r}, which has no special token, and there "
            "is no EOS either: a completion could never stop; set policy.chat_template"
        )
    several = _encode(tokenizer, _render(tokenizer, [question, answer, question], generation_prompt=True))
    return _Template(source, int(end), several.count(tokenizer.bos_token_id) > 1)


def _render(
    tokenizer: Any, messages: list[dict[str, str]], *, generation_prompt: bool, row_id: int | None = None
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{_name(tokenizer)} has no chat template, so conversations cannot be rendered; take an instruction-tuned "
            "checkpoint (google/gemma-2-2b-it instead of google/gemma-2-2b) or set policy.chat_template"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))
    except TemplateError as error:
        where = "" if row_id is None else f" (row {row_id})"
        advice = (
            "set data.system_role to merge or drop"
            if any(message["role"] == "system" for message in messages)
            else "correct the row or set policy.chat_template"
        )
        raise UserError(
            f"the chat template of {_name(tokenizer)} refuses a conversation{where}: {error}; {advice}"
        ) from error


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]


def _written(tokenizer: Any, prompt: Prompt) -> str:
    if not prompt.conversational:
        return prompt.text
    return _render(tokenizer, prompt.messages(), generation_prompt=True, row_id=prompt.row_id)


def _or_error(make: Callable[P, T], *given: P.args, **named: P.kwargs) -> T | UserError:
    try:
        return make(*given, **named)
    except UserError as error:
        return error


def _one_bos(tokenizer: Any, ids: list[int], prompt: Prompt) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    marks_turns = prompt.conversational and _template(tokenizer).bos_marks_turns
    if ids[:1] != [bos]:
        ids = [int(bos), *ids]
    if not marks_turns and ids.count(bos) != 1:
        raise UserError(
            f"row {prompt.row_id} renders to {ids.count(bos)} BOS tokens, and models are trained on one; remove "
            f"{tokenizer.bos_token!r} from the row's text or correct the chat template"
        )
    return ids


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or "the tokenizer")
