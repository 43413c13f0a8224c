"""``ScalarModel``: a transformers sequence classifier with one label, as a function from token rows to scores."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.interfaces import Objective, TokenStats
from rlhf.models.layout import Rows, plain_rows
from rlhf.models.load import base_model
from rlhf.models.policy import final_states, switch_off_dropout
from rlhf.rollout import TokenBatch


class ScalarModel(nn.Module):
    """Reads the scalar head at the last real token of each row (Ouyang et al. 2022; positions from the mask, never
    from pad ids). ``reward_center`` in the model's config is subtracted by whoever scores with it, not here.

    classifier: a transformers sequence classifier, or a PeftModel around one."""

    def __init__(self, classifier: nn.Module, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.classifier = classifier
        self.compute_dtype = compute_dtype
        switch_off_dropout(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        segments: Tensor | None = None,
        last: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"scores": [R]} in float32 or wider; with ``segments``, [n] at the flat positions ``last``
        (``models.prefixes``)."""
        model = cast(Any, base_model(self.classifier))
        low = self.compute_dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(input_ids.device.type, dtype=self.compute_dtype if low else None, enabled=low):
            hidden = final_states(model, input_ids, attention_mask, position_ids, segments)
            if last is None:
                assert attention_mask is not None
                rows, width = input_ids.shape
                columns = torch.arange(width, device=input_ids.device)
                last = (attention_mask * columns).argmax(dim=1) + width * torch.arange(rows, device=input_ids.device)
            scores: Tensor = model.score(hidden[last]).squeeze(-1)
        return {"scores": scores if scores.dtype == torch.float64 else scores.float()}


def scalar_scores(model: nn.Module, rows: Rows) -> Tensor:
    """[R] scores of laid-out rows through a (wrapped) ``ScalarModel``."""
    assert rows.attention_mask is not None  # the last real token of a row is found by it
    flat = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, position_ids=rows.position_ids)
    return cast(Tensor, flat["scores"])


def scalar_stats(model: nn.Module, batch: TokenBatch) -> TokenStats:
    """Statistics with ``scores`` only: a reward model has none of tokens."""
    scores = scalar_scores(model, plain_rows(batch))
    return TokenStats(logprobs=scores.new_zeros(0), scores=scores)


def scalar_forward(model: nn.Module, batch: TokenBatch, objective: Objective) -> TokenStats:
    """The updater's forward for reward-model training; every objective gets the same statistics."""
    return scalar_stats(model, batch)
