"""A reward model as a source of scores. Text is the interface: it has its own tokenizer and its own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.chat import render_completion, render_prompt
from rlhf.models.scalar import ScalarModel
from rlhf.rollout import Rollout, pad_rows


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A transformers sequence classifier with one label.

    tokenizer: the reward model's own. compute_dtype: autocast type of the forward. microbatch_tokens: rows × padded
    width of one forward. A row of more than ``max_tokens`` tokens (the model's context) cannot be scored.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    compute_dtype: torch.dtype = torch.float32
    microbatch_tokens: int = 16384

    @property
    def max_tokens(self) -> int | None:
        """Longest row the model has positions for, in tokens."""
        return getattr(self._config.get_text_config(), "max_position_embeddings", None)

    @property
    def center(self) -> float:
        """Subtracted from every score, so that SFT demonstrations average 0 (``config.reward_center``)."""
        return float(getattr(self._config, "reward_center", None) or 0.0)

    @property
    def _config(self) -> Any:
        return cast(Any, self.model).config

    def score(self, rollout: Rollout, step: int = 0) -> Tensor:
        """[B] float32 on the rollout's device; NaN for rows longer than the model's context.

        A completion that did not finish is scored as it stands: its turn is never closed for it.
        """
        rows = self.token_rows(rollout)
        scores = torch.full((len(rows),), torch.nan)
        fitting = [i for i, row in enumerate(rows) if self.max_tokens is None or len(row) <= self.max_tokens]
        for part in microbatches([len(rows[i]) for i in fitting], self.microbatch_tokens):
            chosen = [fitting[i] for i in part]
            scores[chosen] = self._forward([rows[i] for i in chosen]).float().cpu() - self.center
        return scores.to(rollout.group.device)

    def token_rows(self, rollout: Rollout) -> list[list[int]]:
        """Prompt and completion in this model's own tokens, [B] lists."""
        prompts: dict[int, list[int]] = {}
        for prompt in rollout.prompts:  # the k completions of a prompt share the object
            if id(prompt) not in prompts:
                prompts[id(prompt)] = render_prompt(self.tokenizer, prompt)
        return [
            prompts[id(prompt)] + render_completion(self.tokenizer, prompt, text, finished)
            for prompt, text, finished in zip(rollout.prompts, rollout.texts, rollout.finished.tolist(), strict=True)
        ]

    @torch.no_grad()
    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[n] scores read at each row's last token."""
        model = cast(Any, self.model)
        device = next(model.parameters()).device
        ids, mask = (value.to(device) for value in pad_rows(rows, side="right"))
        model.eval()
        if hasattr(model, "score"):  # a decoder with a scalar head: read by the mask, never by pad ids
            scalar = ScalarModel(model, compute_dtype=self.compute_dtype)
            positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
            return cast(Tensor, scalar(ids, mask.long(), positions)["scores"])
        low = self.compute_dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(device.type, dtype=self.compute_dtype if low else None, enabled=low):
            return cast(Tensor, model(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1))


def microbatches(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Row indices packed longest first while rows × longest stays within the budget; a longer row goes alone."""
    packed: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if packed and (len(packed[-1]) + 1) * lengths[packed[-1][0]] <= budget_tokens:
            packed[-1].append(index)
        else:
            packed.append([index])
    return packed


def load_reward_model(
    path: str,
    *,
    device: torch.device | str,
    compute_dtype: torch.dtype = torch.float32,
    microbatch_tokens: int = 16384,
    name: str | None = None,
) -> RewardModel:
    """A frozen reward model and its tokenizer from a folder or the hub.

    Weights are float32 when computing in float32, else in the type they were stored in. Raises UserError where nothing
    can be loaded, where the head has another number of outputs than one, and where weights are missing (they would be
    random, and a random head still gives scores).
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    where = f"reward.models: path={path}"
    try:
        config = AutoConfig.from_pretrained(path)
        if config.num_labels != 1:
            raise UserError(
                f"{where}: has {config.num_labels} outputs (num_labels), and a reward model has one; a language model "
                "becomes one with objective=reward"
            )
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=torch.float32 if compute_dtype == torch.float32 else "auto",
            output_loading_info=True,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{where}: no reward model could be loaded ({reason})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up for a folder without one
        raise UserError(f"{where}: holds no tokenizer, and a reward model reads text with its own; save it beside it")
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(
            f"{where}: the checkpoint lacks weights ({missing}); they would be random: train it with objective=reward"
        )
    model.requires_grad_(False).eval()
    return RewardModel(
        name=name or short_name(path),
        model=model.to(device),
        tokenizer=tokenizer,
        compute_dtype=compute_dtype,
        microbatch_tokens=microbatch_tokens,
    )


def short_name(path: str) -> str:
    """What scores of this model are called: ``runs/quickstart-reward/final`` → ``quickstart-reward``."""
    place = Path(path)
    return place.parent.name if place.name == "final" and place.parent.name else place.name
