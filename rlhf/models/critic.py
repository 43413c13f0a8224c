"""V(x, y_<t) at every completion position: by a trunk of its own with a scalar head, or by a head on the policy's."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.models.load import base_model
from rlhf.models.policy import final_states, switch_off_dropout


class Critic(nn.Module):
    """A sequence classifier with one label (a reward model, for one), read at every position instead of the last.

    It lives inside ``ScoredModel``, so one forward, one wrapper and one optimizer hold actor and critic.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        switch_off_dropout(self)

    def forward(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        source: Tensor,
        segments: Tensor | None = None,
    ) -> Tensor:
        """[n] values at the flat positions ``source``: what is expected before the token there is written. hidden: the
        policy's states there, which this critic does not look at."""
        model = cast(Any, base_model(self.classifier))
        states = final_states(model, input_ids, attention_mask, position_ids, segments)
        values: Tensor = model.score(states[source]).squeeze(-1)
        return values if values.dtype == torch.float64 else values.float()


class ValueHead(nn.Module):
    """A linear head on the policy's own final states, 0 at the start. Cheap, and its loss shapes the policy's trunk."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, *rows: Tensor | None) -> Tensor:
        """[n, H] → [n]."""
        values: Tensor = self.linear(hidden).squeeze(-1)
        return values if values.dtype == torch.float64 else values.float()
