"""Recipe → what draws completions: our loop, or an engine with a copy of the policy."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from rlhf.assemble import models
from rlhf.errors import UserError
from rlhf.interfaces import Ended, Sampler
from rlhf.models.chat import stop_ids
from rlhf.recipe import Recipe
from rlhf.recipe.servers import addresses, token_of
from rlhf.runtime import decoding, distributed
from rlhf.runtime.distributed import Runtime
from rlhf.sampling.engine import Engine, EngineSampler, Shared
from rlhf.sampling.hf import HFSampler
from rlhf.sampling.vllm import InProcess, Start
from rlhf.sampling.vllm_server import Server


def sampler(
    recipe: Recipe,
    runtime: Runtime,
    tokenizer: Any,
    wrapped: torch.nn.Module,
    k: int,
    temperature: float,
    engine: Engine | None = None,
    ended: Ended | None = None,
) -> Sampler:
    """k completions a prompt, decoded by the policy itself or by ``engine``, which several samplers may share."""
    inner: Any = distributed.unwrap(wrapped).causal_lm
    settings = recipe.rollout
    same: dict[str, Any] = {
        "tokenizer": tokenizer,
        "samples_per_prompt": k,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": temperature,
        "stop": settings.stop,
        "stop_ids": stop_ids(tokenizer, inner.generation_config),
        "seed": recipe.run.seed,
        "compute_dtype": models.compute_dtype(recipe),
        "gather": lambda lm: (
            decoding.by_layer(runtime, wrapped, lm) if settings.gather == "layers" else decoding.whole(runtime, wrapped)
        ),
        "ended": ended,
    }
    if engine is not None:
        return EngineSampler(engine=engine, **same)
    width = recipe.data.max_prompt_tokens + settings.max_new_tokens
    return HFSampler(
        microbatch_rows=max(k, min(512, 4 * recipe.batch.microbatch_tokens // width)),
        plain=settings.decode == "generate",
        kv_bytes=int(settings.kv_cache_gib * 2**30),
        **same,
    )


def engine(recipe: Recipe, runtime: Runtime, tokenizer: Any, run: Path) -> Engine | None:
    """What decodes in place of the policy, where the recipe says so. It starts when it is first asked. run: folder."""
    settings = recipe.rollout
    if settings.engine == "hf":
        return None
    if settings.url is not None:
        return Shared(_server(recipe, settings.url, run), runtime)
    if runtime.world_size > 1:
        raise UserError(
            f"rollout.engine=vllm decodes in the process that trains, and there are {runtime.world_size}; start "
            "`rlhf serve-policy` and set rollout.url, launch one process, or set rollout.engine=hf"
        )
    return InProcess(
        start=vllm_start(recipe),
        tokenizer=tokenizer if settings.stop else None,
        sleeps=settings.sleep and torch.cuda.is_available(),
    )


def vllm_start(recipe: Recipe) -> Start:
    """How vLLM is started for this recipe, here or as a server."""
    settings = recipe.rollout
    return Start(
        tokens=recipe.data.max_prompt_tokens + settings.max_new_tokens,
        dtype=models.compute_dtype(recipe),
        memory_fraction=settings.gpu_fraction,
        kv_bytes=int(settings.kv_cache_gib * 2**30),
    )


def _server(recipe: Recipe, url: str, run: Path) -> Engine:
    settings = recipe.rollout
    return Server(
        url=addresses(url)[0],
        folder=_push_folder(settings.push_folder, run),
        dtype=models.compute_dtype(recipe),
        token=token_of(settings.token_env) if settings.token_env else None,
    )


def _push_folder(named: str | None, run: Path) -> Path:
    """Each run's own, the same one when it goes on."""
    if named is None:
        return run / "pushed"
    return Path(named) / f"{run.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"
