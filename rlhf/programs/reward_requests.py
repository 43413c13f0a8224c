"""The bodies that a reward server takes, read strictly, and the texts that they ask to be scored."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from rlhf.programs.reward_queue import Ids, Texts
from rlhf.rollout import Prompt, Turn


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Message(_Body):
    role: str = Field(min_length=1)
    content: str


Messages = Annotated[list[Message], Field(min_length=1)]


class Row(_Body):
    """A completion of a prompt, which is plain text or a conversation."""

    prompt: str | Messages
    completion: str
    finished: bool = True


class ScoreRequest(_Body):
    """Body of ``POST /v1/score``."""

    rows: Annotated[list[Row], Field(min_length=1)]

    def __len__(self) -> int:
        return len(self.rows)

    def asked(self) -> Texts:
        seen: dict[Any, Prompt] = {}
        prompts = []
        for number, row in enumerate(self.rows):
            turns = () if isinstance(row.prompt, str) else tuple((turn.role, turn.content) for turn in row.prompt)
            key = turns or row.prompt
            if key not in seen:
                made = tuple(Turn(role=role, content=content) for role, content in turns)
                seen[key] = Prompt(row_id=number, turns=made, text="" if turns else str(row.prompt))
            prompts.append(seen[key])
        return Texts(
            prompts=prompts,
            texts=[row.completion for row in self.rows],
            finished=[row.finished for row in self.rows],
        )


TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]


class IdRow(_Body):
    """A completion of a prompt, both in the tokens of a policy that has the model's own vocabulary."""

    prompt: TokenIds
    completion: TokenIds
    conversation: bool
    finished: bool = True


class IdsRequest(_Body):
    """Body of ``POST /v1/score/ids``."""

    rows: Annotated[list[IdRow], Field(min_length=1)]

    def __len__(self) -> int:
        return len(self.rows)

    def asked(self) -> Ids:
        seen: dict[tuple[int, ...], Prompt] = {}
        prompts = [seen.setdefault(tuple(row.prompt), Prompt(row_id=number)) for number, row in enumerate(self.rows)]
        return Ids(
            prompts=prompts,
            prompt_ids=[row.prompt for row in self.rows],
            completion_ids=[row.completion for row in self.rows],
            conversational=[row.conversation for row in self.rows],
            finished=[row.finished for row in self.rows],
        )


class OpenRLHFRequest(BaseModel):
    """Body of ``POST /get_reward``: prompt and completion as one rendered text each. What else comes with them
    (``prompts``, ``labels``) is not read."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    query: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]

    def __len__(self) -> int:
        return len(self.query)

    def asked(self, bos: str | None) -> Texts:
        """Each text as it stands, stop token or none. ``bos``: the model's own, which is put in front of every row."""
        return Texts(
            prompts=[Prompt(row_id=i, text=text.removeprefix(bos or "")) for i, text in enumerate(self.query)],
            texts=[""] * len(self.query),
            finished=[False] * len(self.query),
        )


SCORE: TypeAdapter[ScoreRequest] = TypeAdapter(ScoreRequest)
IDS: TypeAdapter[IdsRequest] = TypeAdapter(IdsRequest)
OPENRLHF: TypeAdapter[OpenRLHFRequest] = TypeAdapter(OpenRLHFRequest)


def refusal(error: ValidationError) -> str:
    """The first thing that is wrong, by its place and never by its value: a body may be long, or private."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:80]
    said = "is not JSON" if first["type"] == "json_invalid" else first["msg"][:120]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place or 'body'}: {said}{more}"
