"""``Critic``: V(x, y_<t) at every completion position, by a trunk of its own with a scalar head."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.models.load import base_model
from rlhf.models.policy import switch_off_dropout


class Critic(nn.Module):
    """A sequence classifier with one label (a reward model, for one), read at every position instead of the last.

    It lives inside ``ScoredModel``, so one forward, one wrapper and one optimizer hold actor and critic.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        switch_off_dropout(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, source: Tensor) -> Tensor:
        """[n] values at the flat positions ``source``: what is expected before the token there is written."""
        model = cast(Any, base_model(self.classifier))
        decoder = getattr(model, model.base_model_prefix)
        output = decoder(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        values: Tensor = model.score(output.last_hidden_state.flatten(0, 1)[source]).squeeze(-1)
        return values if values.dtype == torch.float64 else values.float()
