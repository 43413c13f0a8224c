"""Several adapters on one base: a policy's, and beside it those of frozen reward models that were trained on that base.

A LoRA reward model's ``final/`` holds the merged weights, which anybody can load, and in ``adapter/`` what is needed to
put it on its base again: the adapter, the score head, and which base that was.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.load import base_model, base_of_adapter
from rlhf.runtime.fingerprint import fingerprint
from rlhf.runtime.manifest import write_json_atomic

FOLDER = "adapter"  # below a reward model's own folder
_SETTINGS, _WEIGHTS, _BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
_HEAD = "base_model.model.score."  # peft's name of what is trained whole beside the adapter
_ELSE = "set placement: auto, which loads the reward model whole"


def keep(model: nn.Module, folder: Path, content: str | None) -> None:
    """Writes the adapter and the head of a LoRA reward model into ``folder/adapter``. On one rank, weights gathered.

    content: ``fingerprint`` of the base's folder; None = the base is no folder of this machine.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    place = folder / FOLDER
    place.mkdir()
    peft = cast(Any, model)
    found: dict[str, Tensor] = get_peft_model_state_dict(peft, adapter_name="default", save_embedding_layers=False)
    own = {name: value.detach().cpu().contiguous() for name, value in found.items()}
    save_file(own, place / _WEIGHTS, metadata={"format": "pt"})
    settings = copy.deepcopy(peft.peft_config["default"])
    settings.inference_mode = True
    base = Path(settings.base_model_name_or_path)
    settings.base_model_name_or_path = str(base.resolve()) if base.exists() else str(base)
    settings.save_pretrained(place)
    write_json_atomic(place / _BASE, {"name": settings.base_model_name_or_path, "content": content})


def refuse_another_base(path: str, policy: str, where: str) -> None:
    """Raises UserError where the reward model at ``path`` is no adapter on the base that ``policy`` names: the same
    content where both are folders, else the same id. Reads files only, before anything is loaded."""
    try:
        base = json.loads((Path(path).expanduser() / FOLDER / _BASE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}={path}: holds no {FOLDER}/ with its base ({type(error).__name__}); {_ELSE}"
        ) from error
    if base_of_adapter(policy) is not None:
        raise UserError(
            f"{where}={path}: its adapter was trained on {base['name']}, and policy.path={policy} is an adapter too, "
            f"which is merged into another base; {_ELSE}"
        )
    here = Path(policy).expanduser()
    if here.is_dir():
        same, there = base["content"] == fingerprint(here), base["name"] == str(here.resolve())
    else:
        same, there = base["name"] == policy, False
    if not same:
        changed = "which has changed since" if there else f"and policy.path={policy} is another"
        raise UserError(f"{where}={path}: its adapter was trained on {base['name']}, {changed}; {_ELSE}")


@dataclass(frozen=True)
class Beside:
    """A frozen adapter on a policy's base. name: peft's. classifier: the policy's trunk, the reward model's head."""

    policy: nn.Module
    name: str
    classifier: TrunkClassifier

    @contextmanager
    def on(self) -> Iterator[None]:
        """The policy's trunk is the reward model's inside; adapter, modes and ``requires_grad`` are afterwards what
        they were, whatever happens."""
        policy = cast(Any, self.policy)
        modes = [(module, module.training) for module in policy.modules()]
        trained = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
        active = policy.active_adapter
        try:
            policy.set_adapter(self.name, inference_mode=True)
            yield
        finally:
            policy.set_adapter(active)
            for parameter, flag in trained:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


class TrunkClassifier(nn.Module):
    """The part of a transformers sequence classifier that is read here, on a trunk that belongs to another model.

    config: the reward model's own; its attention is that of the trunk.
    """

    def __init__(self, model: nn.Module, score: nn.Module, config: Any) -> None:
        super().__init__()
        base = cast(Any, model)
        self.base_model_prefix: str = base.base_model_prefix
        self.add_module(self.base_model_prefix, getattr(base, self.base_model_prefix))
        self.score = score
        self.config = copy.deepcopy(config)
        self.config._attn_implementation = base.config._attn_implementation

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self._trunk.dtype)

    @property
    def _trunk(self) -> Any:
        return getattr(self, self.base_model_prefix)

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self._trunk.get_input_embeddings())


def put_beside(policy: nn.Module, path: str, name: str, config: Any, where: str) -> Beside:
    """Adds the adapter at ``path`` to the policy, frozen and switched off, under ``name``; no base weight is copied.

    policy: a PeftModel. config: of the reward model. The global random state stays as it is. Raises UserError where the
    adapter does not fit the policy's base.
    """
    from safetensors.torch import load_file

    folder = Path(path).expanduser() / FOLDER
    try:
        tensors = load_file(folder / _WEIGHTS)
        own = {key: tensors.pop(key) for key in list(tensors) if key.startswith(_HEAD)}
        _add(cast(Any, policy), folder, name)
        _fill(policy, name, tensors)
        score = _head(own, next(policy.parameters()).device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{where}: its adapter does not fit the policy's base ({reason}); {_ELSE}") from error
    return Beside(policy, name, TrunkClassifier(base_model(policy), score, config).eval())


def _add(policy: Any, folder: Path, name: str) -> None:
    """An adapter of the folder's kind with weights that are yet to be filled in."""
    from peft import PeftConfig

    settings: Any = PeftConfig.from_pretrained(str(folder))
    settings.modules_to_save, settings.task_type, settings.inference_mode = None, "CAUSAL_LM", True
    trained = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    with torch.random.fork_rng(devices=[]):  # what peft draws is overwritten
        policy.add_adapter(name, settings)
    for parameter, flag in trained:
        parameter.requires_grad_(flag)


@torch.no_grad()
def _fill(policy: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Every weight of the adapter from the file, and nothing of the file left over. Raises ValueError."""
    own = {key.replace(f".{name}.", "."): p for key, p in policy.named_parameters() if f".{name}." in key}
    if set(own) != set(tensors):
        raise ValueError(f"other layers, such as {sorted(set(own) ^ set(tensors))[0]}")
    for key, parameter in own.items():
        if parameter.shape != tensors[key].shape:
            raise ValueError(f"{key} is {tuple(tensors[key].shape)}, and {tuple(parameter.shape)} is needed")
        parameter.copy_(tensors[key])
        parameter.requires_grad_(False)


def _head(tensors: Mapping[str, Tensor], device: torch.device) -> nn.Linear:
    weight = tensors[f"{_HEAD}weight"]
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=f"{_HEAD}bias" in tensors, device="meta")
    head.load_state_dict({key.removeprefix(_HEAD): v.to(device) for key, v in tensors.items()}, assign=True)
    return head.requires_grad_(False)
