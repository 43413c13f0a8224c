"""``rlhf serve-policy``: a vLLM server for the rollouts of a recipe, told everything that the trainer expects of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

from rlhf.assemble import models
from rlhf.assemble.sampling import vllm_start
from rlhf.errors import UserError
from rlhf.models.load import configuration
from rlhf.recipe import Recipe
from rlhf.sampling.vllm_server import MODEL
from rlhf.sampling.vllm_worker import WORKER


def serve(recipe: Recipe, host: str, port: int, more: Sequence[str]) -> int:
    """Serves until it is stopped; returns vLLM's exit code. more: options of ``vllm serve``, which win over ours."""
    tokenizer = models.tokenizer_of(recipe)
    config = configuration(models.weightless(recipe, tokenizer))
    start = vllm_start(recipe)
    with tempfile.TemporaryDirectory(prefix="rlhf-policy-") as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        where = ["--host", host, "--port", str(port)]
        command = [*_vllm(), folder, "--served-model-name", MODEL, *where, *options(start.arguments()), *more]
        return _run(command, {**start.environment(), **os.environ, **_opened(recipe)})


def _vllm() -> list[str]:
    """``vllm serve``, which asks for the version of a package "vllm". Builds for CPUs have another name: they start
    the older way."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def options(arguments: Mapping[str, Any]) -> list[str]:
    """Keyword arguments of ``vllm.LLM`` as options of ``vllm serve``, and the method that takes our weights."""
    found = ["--worker-extension-cls", WORKER]
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        else:
            found += [f"--{option}", str(value)]
    return found


def _opened(recipe: Recipe) -> dict[str, str]:
    """The calls by which weights are pushed are open only in vLLM's development mode."""
    opened, token = {"VLLM_SERVER_DEV_MODE": "1"}, recipe.rollout.token_env
    if token is None:
        return opened
    if not os.environ.get(token):
        raise UserError(f"rollout.token_env={token}: the variable is not set; export it with the token to ask for")
    return {**opened, "VLLM_API_KEY": os.environ[token]}


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    process = subprocess.Popen(command, env=dict(environment))
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    while True:
        with suppress(KeyboardInterrupt):  # it got the same one, and is on its way out
            code = process.wait()
            return code if code >= 0 else 128 - code  # killed by a signal, as shells say it
