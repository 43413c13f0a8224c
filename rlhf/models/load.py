"""Models and tokenizers from folders or the hub, and back into transformers folders. No remote code, no pickle."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from rlhf.errors import UserError
from rlhf.models import families, quantized
from rlhf.models.quantized import Quantization


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapter: rank r, scale alpha / r, on all linear layers or on the named ones."""

    r: int
    alpha: float
    targets: Literal["all-linear"] | Sequence[str] = "all-linear"


def quiet_libraries() -> None:
    """What transformers tells of loading and saving is checked here and said in our own words."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_tokenizer(path: str, *, what: str = "policy.path") -> Any:
    """Raises UserError where there is no tokenizer, or no pad token that differs from the stop tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    except Exception as error:  # a broken tokenizer.json ends in whatever the library trips over, KeyError for one
        reason = _first_line(error) or type(error).__name__
        raise UserError(f"{what}={path}: no tokenizer could be loaded ({reason})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so sharing the id is harmless
    return tokenizer


def load_causal_lm(
    path: str, *, attention: str = "auto", what: str = "policy.path", quantize: Quantization | None = None
) -> nn.Module:
    """A causal LM in float32. The type its weights were stored in is kept as ``model.stored_dtype``.

    A folder that holds an adapter (``final/`` of a LoRA run) gives its base model with the adapter added to it. Of a
    Gemma 3 or 4 that also sees, the text model alone (``families.text_part``).
    quantize: the matrices of its linear layers in fewer bits, all else in float32.
    Raises UserError where the folder or id cannot be loaded or leaves weights uninitialised, and for an adapter that
    would have to be added to quantized weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kwargs: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    base = base_of_adapter(path)
    if quantize is not None:
        refuse_adapter(path, what)
        kwargs |= quantize.loading()
    try:
        config, names = families.text_part(AutoConfig.from_pretrained(base or path), f"{what}={path}")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base or path,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            **names,
            **kwargs,
        )
        model, info = loaded
        families.forget_names(model)
        model = _with_adapter(model, path) if base is not None else model
    except (OSError, ValueError) as error:
        raise UserError(f"{what}={path}: no causal language model could be loaded ({_first_line(error)})") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{what}={path}: the checkpoint lacks weights ({missing}); they would be random")
    if quantize is not None:
        quantized.settle(model, f"{what}={path}")
    model.stored_dtype = getattr(config, "dtype", None) or torch.float32
    return cast(nn.Module, model)


def base_of_adapter(path: str) -> str | None:
    """What the adapter in this folder belongs to; None where the folder holds no adapter alone."""
    folder = Path(path)
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return None
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return cast(str, settings["base_model_name_or_path"])


def refuse_adapter(path: str, what: str) -> None:
    """Raises UserError for an adapter's folder: adding it to weights in fewer bits would round it away."""
    if base_of_adapter(path) is not None:
        raise UserError(
            f"{what}={path}: is an adapter, and quantized weights take none in; `rlhf merge {path} --output FOLDER` "
            "writes the whole model"
        )


def _with_adapter(model: nn.Module, folder: str) -> Any:
    """The base model with the folder's adapter merged into its weights, and the folder's stop ids."""
    from peft import PeftConfig, PeftModel
    from transformers import GenerationConfig

    config = PeftConfig.from_pretrained(folder)
    config.task_type = None  # a language model's adapter, also in a classifier with the same trunk
    merged: Any = PeftModel.from_pretrained(cast(Any, model), folder, config=config).merge_and_unload()
    merged.requires_grad_(True)
    if (Path(folder) / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(folder)
    return merged


def load_classifier(path: str, seed: int, *, attention: str = "auto") -> nn.Module:
    """A sequence classifier with one label on the trunk found at ``path``. A head that is not in the checkpoint (a
    causal LM's) is drawn from N(0, 1/√(d+1)) (Stiennon et al. 2020), bias 0. An adapter's folder gives its base with
    the adapter added to it, as in ``load_causal_lm``.

    Raises UserError where the trunk cannot be loaded whole.
    """
    from transformers import AutoModelForSequenceClassification

    kwargs: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    base = base_of_adapter(path)
    kwargs |= {"num_labels": 1, "dtype": torch.float32, "output_loading_info": True, "use_safetensors": True}
    try:
        with torch.random.fork_rng(devices=[]):
            model, info = AutoModelForSequenceClassification.from_pretrained(base or path, **kwargs)
            model = _with_adapter(model, path) if base is not None else model
    except (OSError, ValueError) as error:
        raise UserError(f"policy.path={path}: no classifier could be built on it ({_first_line(error)})") from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("score."))
    if missing:
        raise UserError(f"policy.path={path}: the checkpoint lacks weights ({', '.join(missing[:3])})")
    if any(name.startswith("score.") for name in info["missing_keys"]):
        generator = torch.Generator().manual_seed(seed)
        head = model.score.weight
        with torch.no_grad():
            head.copy_(torch.randn(head.shape, generator=generator) / (head.shape[1] + 1) ** 0.5)
    return cast(nn.Module, model)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that never trains: the reference of a policy that starts as itself. Weights that the model does not train
    (below an adapter) are shared with it, not copied; where all are frozen already they are copied."""
    trained = any(parameter.requires_grad for parameter in model.parameters())
    shared = {id(p): p for p in model.parameters() if not p.requires_grad} if trained else {}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def add_lora(
    model: nn.Module, spec: LoraSpec, seed: int, *, task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
) -> nn.Module:
    """Wraps the model with a trainable adapter that starts as the identity (B = 0). Dropout stays off.

    task ``SEQ_CLS``: a classifier, whose score head (it starts random) is trained in full beside the adapter.
    Raises UserError where ``spec.targets`` are no linear layers of the model.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = spec.targets if isinstance(spec.targets, str) else list(spec.targets)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=cast(int, spec.alpha),
        target_modules=targets,
        lora_dropout=0.0,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return cast(nn.Module, get_peft_model(cast(Any, model), config))
        except ValueError as error:  # peft's own kinds are ValueErrors too
            raise UserError(f"policy.lora.targets={spec.targets}: {_first_line(error)}") from error


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model below an adapter, or the model itself where there is none."""
    return cast(nn.Module, cast(Any, model).get_base_model()) if hasattr(model, "get_base_model") else model


def configuration(model: nn.Module) -> Any:
    """The config from which another program builds this model (below its adapter)."""
    base: Any = base_model(model)
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    return config


def weightless_causal_lm(path: str) -> nn.Module:
    """The causal LM that ``load_causal_lm`` gives for ``path``, on the meta device: shapes and no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config, _ = families.text_part(AutoConfig.from_pretrained(base_of_adapter(path) or path), f"policy.path={path}")
        with torch.device("meta"):
            return cast(nn.Module, AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise UserError(f"policy.path={path}: no causal language model could be read ({_first_line(error)})") from error


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights with the adapter added (W + α/r·BA), under the names they have without one, each made when it is
    asked for.

    The model itself is left as it is: merging in place and taking it out again would round every weight twice.
    """
    base = base_model(model)
    adapted: dict[str, Any] = {
        f"{name}.weight": module for name, module in base.named_modules() if "default" in getattr(module, "lora_A", ())
    }
    for key, value in base.state_dict().items():
        if ".lora_" in key or ".original_module." in key:
            continue
        name = key.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        yield name, value + adapted[name].get_delta_weight("default") if name in adapted else value


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """``merged_weights``, all at once."""
    return dict(merged_weights(model))


def keep_activations(model: nn.Module, how: Literal["keep", "recompute", "offload"]) -> None:
    """What is held of a transformers model's layers for backward. It acts in training mode alone: not in rollouts, nor
    in a frozen copy. Raises UserError where there is no device to take anything off."""
    if how == "keep":
        return
    if how == "offload" and not torch.accelerator.is_available():
        raise UserError("batch.activations=offload moves them off a GPU, and there is none here; set recompute or keep")
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"batch.activations={how}: {type(model).__name__} cannot compute its layers again; set keep")
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False}, **({"offload": True} if how == "offload" else {}))


def export(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    stop_ids: Sequence[int],
    card: str,
    merge: bool = False,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Writes a transformers folder (weights, tokenizer, generation config, model card), whole or not at all.

    Weights keep the type they were loaded in. merge: an adapter is added to the weights instead of being the folder's
    only content. extra: adds what else belongs into the folder while it is still being staged. Call on one rank, with
    the weights gathered.
    """
    state = merged_state(model) if merge else model.state_dict()
    model = base_model(model) if merge else model
    staging = folder.with_name(f".staging-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    generation = getattr(model, "generation_config", None)
    if generation is not None and stop_ids:
        generation.eos_token_id = list(stop_ids)
    own = {"selected_adapters": ["default"]} if hasattr(model, "peft_config") else {}  # and no reward model's beside it
    cast(Any, model).save_pretrained(staging, state_dict=_stored(model, state), **own)
    if not merge and hasattr(model, "peft_config"):
        _complete_adapter(model, staging)
    tokenizer.save_pretrained(staging)
    (staging / "README.md").write_text(card, encoding="utf-8")
    if extra is not None:
        extra(staging)
    if folder.exists():
        shutil.rmtree(folder)
    staging.rename(folder)


def _complete_adapter(model: Any, folder: Path) -> None:
    """What an adapter's folder needs to be found and sampled from anywhere: where its base lies, and the stop ids."""
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    base = Path(settings["base_model_name_or_path"])
    if base.exists():
        settings["base_model_name_or_path"] = str(base.resolve())
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    model.generation_config.save_pretrained(folder)


def _stored(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state on the CPU in the type it was loaded in. What is one tensor under two names stays one, so that tied
    weights are written once."""
    dtype = getattr(model, "stored_dtype", torch.float32)
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    for value in state.values():
        if _place(value) not in copies:
            copies[_place(value)] = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
    return {name: copies[_place(value)] for name, value in state.items()}


def _place(value: torch.Tensor) -> tuple[Any, ...]:
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
