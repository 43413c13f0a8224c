"""A reward model on the policy's base weights: an adapter beside the policy's and a score head, nothing else."""

from __future__ import annotations

import torch
from torch import nn

from rlhf.models import adapters
from rlhf.models.scalar import ScalarModel
from rlhf.rewards.model import RewardModel, checked_parts, refuse_noise, short_name
from rlhf.runtime.placement import Placed


def reward_model_beside(
    path: str,
    policy: nn.Module,
    *,
    adapter: str,
    compute_dtype: torch.dtype = torch.float32,
    microbatch_tokens: int = 16384,
) -> RewardModel:
    """The LoRA reward model at ``path`` as a second adapter of ``policy`` (a PeftModel on its device), which is what it
    was outside ``RewardModel.score``. adapter: the name that it gets there.

    Raises UserError as ``load_reward_model`` does, and where the adapter does not fit the policy's base; whether that
    is the base that it was trained on, ``models.adapters.refuse_another_base`` tells.
    """
    where = f"reward.models: path={path}"
    tokenizer, config = checked_parts(path, where)
    beside = adapters.put_beside(policy, path, adapter, config, where)
    model = ScalarModel(beside.classifier, compute_dtype=compute_dtype)
    loaded = RewardModel(
        name=short_name(path),
        model=beside.classifier,
        tokenizer=tokenizer,
        compute_dtype=compute_dtype,
        microbatch_tokens=microbatch_tokens,
        placed=Placed(model, use=beside.on),
    )
    refuse_noise(loaded, where)
    return loaded
