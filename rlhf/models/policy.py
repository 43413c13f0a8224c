"""``ScoredModel``: a causal language model as the thing that is trained, returning token statistics, never logits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.interfaces import StatsRequest, TokenStats
from rlhf.models import masks
from rlhf.models.head import ChunkedHead, PositionStats, ReferenceStates
from rlhf.models.layout import Rows
from rlhf.models.load import base_model


class ScoredModel(nn.Module):
    """The only module handed to accelerate. Call it (never a submodule) so that DDP and ZeRO see every forward.

    causal_lm: a transformers causal LM, or a PeftModel around one. Its ``lm_head`` is replaced by a ``ChunkedHead``.
    compute_dtype: autocast type of the forward; float32 and float64 run as they are. critic: one of ``models.critic``
    where the objective asks for values; it is trained and checkpointed with the policy and no part of ``causal_lm``.
    fused: ``ChunkedHead``'s.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        *,
        compute_dtype: torch.dtype = torch.float32,
        chunk_bytes: int | None = None,
        critic: nn.Module | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.critic = critic
        self.compute_dtype = compute_dtype
        inner = self._inner()
        if hasattr(inner.lm_head, "lora_A"):
            raise UserError("policy.lora.targets names the output head, whose chunks are made of its weight alone")
        if not isinstance(inner.lm_head, ChunkedHead):
            text_config = inner.config.get_text_config()
            inner.lm_head = ChunkedHead(
                inner.lm_head, getattr(text_config, "final_logit_softcapping", None), chunk_bytes=chunk_bytes
            )
        self.head.fused = fused
        switch_off_dropout(self)

    def _inner(self) -> Any:
        """The transformers model below an adapter, if there is one."""
        return cast(Any, base_model(self.causal_lm))

    @property
    def head(self) -> ChunkedHead:
        return cast(ChunkedHead, self._inner().lm_head)

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.causal_lm, "disable_adapter")

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        source: Tensor,
        segments: Tensor | None = None,
    ) -> Tensor:
        """[n, H]: final hidden states at the flat positions ``source``."""
        return final_states(self._inner(), input_ids, attention_mask, position_ids, segments)[source]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        source: Tensor,
        target: Tensor,
        request: StatsRequest,
        reference: ReferenceStates | None = None,
        states_only: bool = False,
        segments: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Statistics per position, [n] each, by name; with ``states_only`` the hidden states themselves.

        A dict of tensors, because DDP and ZeRO-3 hooks look for tensors in what a forward returns.
        """
        autocast = self.compute_dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(input_ids.device.type, dtype=self.compute_dtype if autocast else None, enabled=autocast):
            hidden = self.hidden_states(input_ids, attention_mask, position_ids, source, segments)
            if states_only:
                return {"hidden": hidden}
            stats = PositionStats(*self.head(hidden, target, request, reference))
            found = {name: value for name, value in stats._asdict().items() if value is not None}
            if request.values:
                assert self.critic is not None, "values were asked of a policy without a critic"
                found["values"] = self.critic(hidden, input_ids, attention_mask, position_ids, source, segments)
        return found


def final_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, segments: Tensor | None
) -> Tensor:
    """[R·L, H]: the trunk's final hidden states. model: the transformers model. segments: of rows that share a
    beginning; they take the mask's place."""
    decoder = getattr(model, model.base_model_prefix)
    mask: Any = attention_mask
    if segments is not None:
        mask = masks.masks(model, *masks.tree(segments, position_ids))
    output = decoder(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden.flatten(0, 1)


def token_stats(
    model: nn.Module, rows: Rows, request: StatsRequest, reference: ReferenceStates | None = None
) -> TokenStats:
    """One forward of a (wrapped) ``ScoredModel`` over laid-out rows; statistics as [B, C], 0 elsewhere."""
    flat = _forward(model, rows, request=request, reference=reference)
    return TokenStats(**{name: spread(value, rows) for name, value in flat.items()})


@torch.no_grad()
def reference_states(model: nn.Module, rows: Rows, head: ChunkedHead) -> ReferenceStates:
    """The model's hidden states at the rows' positions, with the head that reads them, for the exact KL."""
    flat = _forward(model, rows, request=StatsRequest(), states_only=True)
    return ReferenceStates(flat["hidden"], head)


def _forward(model: nn.Module, rows: Rows, **what: Any) -> dict[str, Tensor]:
    """Calls the (wrapped) model with plain tensors by name, which wrappers can look into."""
    flat: dict[str, Tensor] = model(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        position_ids=rows.position_ids,
        source=rows.source,
        target=rows.target,
        segments=rows.segments,
        **what,
    )
    return flat


def spread(values: Tensor, rows: Rows) -> Tensor:
    """[n] → [B, C] with zeros elsewhere; differentiable."""
    batch, width = rows.shape
    return values.new_zeros(batch * width).scatter(0, rows.place, values).view(batch, width)


def switch_off_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: log π must be the same function in rollout, update and reference."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
