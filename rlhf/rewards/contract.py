"""What a reward server promises: which model it scores with, and how much it takes at once.

The identity stands for everything that a score depends on. A server sends it with every answer, so that one that was
started again with another model is found out by the first score it gives.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from rlhf.rewards.model import RewardModel

IDENTITY_HEADER = "x-reward-identity"
SCORE_PATH, IDS_PATH, CONTRACT_PATH = "/v1/score", "/v1/score/ids", "/v1/contract"

_ENDS = 1024  # elements of a weight at each end that stand for it: hashing 50 GiB would delay every start
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Contract(BaseModel):
    """Answer of ``GET /v1/contract``. Digests are SHA-256.

    identity: over model, vocabulary, special_tokens, chat_template and dtype, each of which changes scores. name: what
    the scores are called. model: configuration, and both ends of every weight. vocabulary, special_tokens,
    chat_template: ``meanings``. center: subtracted from every score. max_tokens: a longer row gets no score.
    deterministic: a score does not depend on who else asks. max_texts, max_body_bytes: of one request.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    identity: Digest
    name: str = Field(pattern=r"^[\w.-]{1,100}$")
    model: Digest
    vocabulary: Digest
    special_tokens: Digest | None = None
    chat_template: Digest | None
    center: float
    max_tokens: int | None
    dtype: str = Field(pattern=r"^\w{1,20}$")
    deterministic: bool
    max_texts: int = Field(ge=1)
    max_body_bytes: int = Field(ge=1)
    version: str = Field(pattern=r"^[\w.+-]{1,40}$")
    protocol: Literal[1] = 1


def contract_of(
    model: RewardModel, *, deterministic: bool, max_texts: int, max_body_bytes: int, version: str
) -> Contract:
    """The contract of a loaded model."""
    parts: dict[str, Any] = {
        "model": model_digest(model.model),
        **meanings(model.tokenizer),
        "dtype": str(model.compute_dtype).removeprefix("torch."),
    }
    return Contract(
        **parts,
        identity=_digest(parts),
        name=re.sub(r"[^\w.-]", "-", model.name)[:100] or "reward",
        center=model.center,
        max_tokens=model.max_tokens,
        deterministic=deterministic,
        max_texts=max_texts,
        max_body_bytes=max_body_bytes,
        version=version,
    )


def model_digest(model: nn.Module) -> str:
    """Over the configuration and, of every parameter, its name, shape, type and both ends.

    Bytes only, no sums: two devices add up in different orders, and replicas have to agree.
    """
    settings = json.loads(cast(Any, model).config.to_json_string(use_diff=False))
    settings = {key: value for key, value in settings.items() if key not in ("transformers_version", "_name_or_path")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        ends = torch.cat([flat[:_ENDS], flat[-_ENDS:]]).cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def vocabulary_digest(tokenizer: Any) -> str:
    """Over every token with its id."""
    return _digest(sorted(tokenizer.get_vocab().items()))


def meanings(tokenizer: Any) -> dict[str, str | None]:
    """Digests of what token ids mean: the text of each, those that begin and end a row, and the template in which a
    conversation becomes ids."""
    template = getattr(tokenizer, "chat_template", None)
    return {
        "vocabulary": vocabulary_digest(tokenizer),
        "special_tokens": _digest([tokenizer.bos_token_id, tokenizer.eos_token_id]),
        "chat_template": None if template is None else _digest(template),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
