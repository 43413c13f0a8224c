"""Global random states as plain byte tensors, for the ``rng`` file of a checkpoint. No pickle.

Training draws nothing from global generators (its noise is a function of seed and step), but reward functions, data
code and dropout of outside models may; a resumed run gives them the same stream.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.runtime.manifest import CheckpointInvalid


def rng_tensors() -> dict[str, Tensor]:
    """uint8 tensors: ``torch`` and, once CUDA is in use, ``cuda`` (this process's device) as torch gives them;
    ``python`` and ``numpy`` as JSON text."""
    version, words, gauss = random.getstate()
    state: Any = np.random.get_state(legacy=False)
    tensors = {
        "python": _encode({"version": version, "words": list(words), "gauss": gauss}),
        "numpy": _encode(_plain(state)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Puts the states of :func:`rng_tensors` back, all or none. Call it last, just before the loop draws.

    A CUDA state is ignored on a machine without CUDA. Raises CheckpointInvalid for a state that is missing or broken.
    """
    try:
        python = _decode(tensors["python"])
        words = (python["version"], tuple(python["words"]), python["gauss"])
        random.Random().setstate(words)
        numpy_state = _decode(tensors["numpy"])
        numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
        np.random.RandomState().set_state(numpy_state)
        torch.Generator().set_state(tensors["torch"])
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointInvalid(f"rng: the random states cannot be restored ({error!r})") from error
    random.setstate(words)
    np.random.set_state(numpy_state)
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _encode(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))


def _plain(value: Any) -> Any:
    """numpy's nested state with arrays and numpy scalars as lists and numbers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
