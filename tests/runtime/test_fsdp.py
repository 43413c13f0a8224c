"""What a launcher may ask of FSDP, what cannot run under shards, and shares cut and put together in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from rlhf.assemble.models import refuse_what_needs_whole_weights
from rlhf.errors import UserError
from rlhf.interfaces import StatsRequest
from rlhf.models.layout import plain_rows
from rlhf.models.policy import token_stats
from rlhf.recipe import load_recipe
from rlhf.runtime import decoding, fsdp
from tests.support import alone, fixed_rollout, policy_and_reference, weights

SHARDED = replace(alone(), kind="fsdp2", world_size=2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith("FSDP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    return monkeypatch


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone: its shares are whole, and everything else is as with two."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_fsdp2_is_taken(asked: pytest.MonkeyPatch) -> None:
    assert fsdp.asked_for()
    asked.setenv("ACCELERATE_USE_FSDP", "false")
    assert not fsdp.asked_for()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FSDP_VERSION", "1", "keeps weights flat"),
        ("FSDP_OFFLOAD_PARAMS", "true", "weights stay on their device"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "batch.activations says"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "in shares outside a forward"),
    ],
)
def test_what_would_have_no_effect_is_refused(name: str, value: str, said: str, asked: pytest.MonkeyPatch) -> None:
    asked.setenv(name, value)
    with pytest.raises(UserError, match=said):
        fsdp.asked_for()


def test_accelerate_does_not_hear_of_it(asked: pytest.MonkeyPatch) -> None:
    asked.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with fsdp.kept_from_accelerate():
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"  # a second run in this process asks again
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["reference.ema=0.5"], "read whole weights, which fsdp2 holds in shards"),
        (["optim.kl_step_limit=0.1"], "put whole weights back after a step, and fsdp2"),
        (["objective=trpo", "policy.compute_dtype=float32"], "put whole weights back after a step, and fsdp2"),
    ],
)
def test_what_needs_whole_weights_is_refused(keys: list[str], said: str) -> None:
    recipe = load_recipe("quickstart/reinforce", keys, inputs=False)
    refuse_what_needs_whole_weights(recipe, alone())
    with pytest.raises(UserError, match=said):
        refuse_what_needs_whole_weights(recipe, SHARDED)


def test_shares_come_together_and_apart(group: None) -> None:
    """Names, ties, values and the forward are those of the model before; the optimizer steps the shares."""
    policy, _ = policy_and_reference()
    rows = plain_rows(fixed_rollout(2, 2))
    names, before = [name for name, _ in policy.named_parameters()], weights(policy)
    with torch.no_grad():
        expected = token_stats(policy, rows, StatsRequest()).logprobs
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    fsdp.shard(policy, optimizer, torch.device("cpu"), torch.float32)
    shares = dict(policy.named_parameters())
    assert list(shares) == names
    assert all(isinstance(share, DTensor) for share in shares.values())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in shares.values()}
    with torch.no_grad():
        assert torch.equal(token_stats(policy, rows, StatsRequest()).logprobs, expected)
    with fsdp.whole(policy):
        assert torch.equal(weights(policy), before)
        inner = policy._inner()
        assert inner.lm_head.weight is inner.model.embed_tokens.weight
        assert not any(isinstance(value, DTensor) for value in policy.state_dict().values())
    assert all(now is share for now, share in zip(policy.parameters(), shares.values(), strict=True))
    share = next(iter(shares.values()))
    assert torch.equal(fsdp.full_tensor(fsdp.share_of(torch.ones(share.shape), share)), torch.ones(share.shape))


def test_decoding_reads_weights_as_forwards_do(group: None) -> None:
    """In bfloat16, and through no hook: the layers of one process may be called when another's are not."""
    policy, _ = policy_and_reference()
    fsdp.shard(policy, torch.optim.AdamW(policy.parameters()), torch.device("cpu"), torch.bfloat16)
    layer = policy._inner().model.layers[0]
    hooks = layer._forward_pre_hooks
    with decoding.whole(replace(SHARDED, compute_dtype=torch.bfloat16), policy):
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
        assert not layer._forward_pre_hooks and not layer._forward_hooks
    assert layer._forward_pre_hooks is hooks and hooks
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
