"""Where the weights, gradients and optimizer state of the trained model lie, by the launch configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf.errors import UserError

Kind = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]

# DeepSpeed's defaults, in elements: what is reduced at once, and how much of ZeRO-3's weights may be whole at once.
BUCKET, LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Placement:
    """kind: how processes share the trained model. processes: over all machines. cpu: they are CPU processes.
    offload_optimizer, offload_weights: to host memory. bucket, live: DeepSpeed's, in elements."""

    kind: Kind
    processes: int = 1
    cpu: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = BUCKET
    live: int = LIVE

    @property
    def deepspeed(self) -> bool:
        return self.kind.startswith("zero")

    @property
    def sharded(self) -> bool:
        """Whether weights are whole on no process."""
        return self.kind in ("zero3", "fsdp2")

    @property
    def lowers(self) -> bool:
        """Whether forwards read weights of the arithmetic's type, where others cast float32 ones as they go."""
        return self.deepspeed or self.kind == "fsdp2"

    def at(self, kind: Kind) -> Placement:
        """The same processes under another kind; one process needs none."""
        return replace(self, kind=kind if self.processes > 1 or kind.startswith("zero") else "single")

    @property
    def said(self) -> str:
        words = {"single": "one process", "ddp": f"{self.processes} processes, replicated (DDP)"}
        words["fsdp2"] = f"{self.processes} processes, FSDP2"
        text = words.get(self.kind, f"{self.processes} processes, ZeRO-{self.kind[-1]}")
        offloaded = [n for n, on in (("optimizer", self.offload_optimizer), ("weights", self.offload_weights)) if on]
        return f"{text}, {' and '.join(offloaded)} in host memory" if offloaded else text


@dataclass(frozen=True)
class Units:
    """What is gathered at once, in weights. layer: the largest decoder layer. rest: all that is in no layer."""

    layer: int
    rest: int


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of the trained model on one process. weights, optimizer (with float32 masters): always there. gradients: at
    the end of a backward. buckets: while gradients travel. gathered: whole weights in a forward, of ZeRO-3 and FSDP2;
    whole: in a rollout, by_layer: in one that gathers layers. stepping: while the optimizer steps. host: what was taken
    off the device."""

    weights: float
    optimizer: float
    gradients: float
    buckets: float
    gathered: float
    whole: float
    stepping: float
    by_layer: float = 0.0
    host: float = 0.0
    gradients_stay: bool = False


def held(
    placement: Placement,
    frozen: int,
    trained: int,
    largest: int,
    *,
    low: bool,
    packed: float = 0.0,
    units: Units | None = None,
) -> Held:
    """Of ``frozen`` and ``trained`` weights. largest: of the largest trained tensor. low: bfloat16 arithmetic. packed:
    bytes of quantized weights beside the frozen ones; every process has them all. units: of the models together;
    None = nothing is in a layer."""
    units = units or Units(layer=0, rest=frozen + trained)
    if placement.deepspeed:
        found = _sharded(placement, frozen, trained, 2 if low else 4, units)
        return replace(found, weights=found.weights + packed)
    if placement.kind == "fsdp2":
        return _fully_sharded(placement, frozen, trained, largest, 2 if low else 4, units)
    buckets = 4.0 * trained if placement.kind == "ddp" else 0.0  # DDP reduces copies of the gradients
    return Held(
        weights=4.0 * (frozen + trained) + packed,
        optimizer=8.0 * trained,
        gradients=4.0 * trained,
        buckets=buckets,
        gathered=0.0,
        whole=0.0,
        # AdamW's √v: of one tensor at a time on a CPU (and its quotient), of all of them at once on a GPU
        stepping=8.0 * largest if placement.cpu else 4.0 * trained,
    )


def _sharded(placement: Placement, frozen: int, trained: int, size: int, units: Units) -> Held:
    """size: bytes of a weight in the engine's type."""
    shards, everything = placement.processes, frozen + trained
    third = placement.kind == "zero3"
    optimizer = (4.0 + 8.0) * trained / shards  # masters are copied in float32 too
    gradients = float(size) * trained / (1 if placement.kind == "zero1" else shards)
    stepping = (4.0 + (8.0 if placement.cpu else 4.0)) * trained / shards
    weights = float(size) * everything / (shards if third else 1)
    live = min(everything, placement.live)
    off, weights_off = placement.offload_optimizer, third and placement.offload_weights
    host = (optimizer + gradients if off else 0.0) + (weights if weights_off else 0.0)
    return Held(
        weights=0.0 if weights_off else weights,
        optimizer=0.0 if off else optimizer,
        gradients=0.0 if off else gradients,
        buckets=float(size) * placement.bucket,
        gathered=float(size) * live if third else 0.0,
        whole=float(size) * everything if third else 0.0,
        by_layer=_two_layers(units, size) if third else 0.0,
        stepping=0.0 if off else stepping,
        host=host,
        gradients_stay=third,
    )


def _fully_sharded(placement: Placement, frozen: int, trained: int, largest: int, size: int, units: Units) -> Held:
    """float32 shares of everything; weights travel in the arithmetic's type, gradients in float32. Two layers are whole
    at once, the one that computes and the next."""
    shards, everything = placement.processes, frozen + trained
    return Held(
        weights=4.0 * everything / shards,
        optimizer=8.0 * trained / shards,
        gradients=4.0 * trained / shards,
        buckets=(size + 4.0) * units.layer if trained > frozen else 0.0,  # an adapter's gradients are nothing
        gathered=_two_layers(units, size),
        whole=float(size) * everything,
        by_layer=_two_layers(units, size),
        stepping=8.0 * largest / shards if placement.cpu else 4.0 * trained / shards,
    )


def _two_layers(units: Units, size: int) -> float:
    """A layer with the buffer that it arrives in, or the next one on its way; and all that is in none."""
    return float(size) * (units.rest + 2 * units.layer)


def read_placement(file: Path | None, processes: int) -> Placement:
    """An accelerate configuration on ``processes`` GPUs (None: one process, or DDP). A CPU configuration keeps its own
    number of processes. Raises UserError for what cannot be read and for kinds of sharding that are not planned for."""
    if file is None:
        return Placement(kind="ddp" if processes > 1 else "single", processes=processes)
    settings = _yaml(file)
    cpu = bool(settings.get("use_cpu"))
    count = int(settings.get("num_processes") or 1) if cpu else processes
    kind = str(settings.get("distributed_type", "NO")).upper()
    if kind == "DEEPSPEED":
        return _deepspeed(settings.get("deepspeed_config") or {}, file, count, cpu)
    if kind == "FSDP":
        return _fsdp(settings.get("fsdp_config") or {}, file, count, cpu)
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UserError(f"{file}: distributed_type {kind} is not planned for; use one of accelerate_configs/*.yaml")
    if kind == "NO" and count > 1:
        raise UserError(f"{file}: starts one process, and there are {count} GPUs; use --gpus 1, zero2 or zero3")
    return Placement(kind="ddp" if count > 1 else "single", processes=count, cpu=cpu)


def _fsdp(given: dict[str, Any], file: Path, processes: int, cpu: bool) -> Placement:
    """The settings that ``rlhf.runtime.fsdp`` takes."""
    if int(given.get("fsdp_version", 1)) != 2 or given.get("fsdp_offload_params"):
        raise UserError(
            f"{file}: only fsdp_version 2 without fsdp_offload_params is run; see accelerate_configs/fsdp2.yaml"
        )
    return Placement(kind="fsdp2" if processes > 1 else "single", processes=processes, cpu=cpu)


def _deepspeed(given: dict[str, Any], file: Path, processes: int, cpu: bool) -> Placement:
    """What accelerate's keys say, or the DeepSpeed file that they name."""
    zero, own = dict(given), given.get("deepspeed_config_file")
    if own is not None:
        path = Path(own) if Path(own).is_absolute() or Path(own).is_file() else file.parent / own
        zero = _yaml(path).get("zero_optimization") or {}
    return from_zero(zero, processes, cpu)


def from_zero(zero: dict[str, Any], processes: int, cpu: bool) -> Placement:
    """Of DeepSpeed's ``zero_optimization`` section, or of accelerate's names for the same keys."""
    stage = int(zero.get("zero_stage", zero.get("stage", 2)))
    if stage not in (1, 2, 3):
        raise UserError(f"DeepSpeed stage {stage} is not planned for; set 1, 2 or 3")
    return Placement(
        kind=f"zero{stage}",  # type: ignore[arg-type]
        processes=processes,
        cpu=cpu,
        offload_optimizer=_offloaded(zero, "optimizer"),
        offload_weights=_offloaded(zero, "param"),
        bucket=_number(zero.get("reduce_bucket_size"), BUCKET),
        live=_number(zero.get("stage3_max_live_parameters"), LIVE),
    )


def _offloaded(zero: dict[str, Any], what: str) -> bool:
    section = zero.get(f"offload_{what}") or {}
    device = zero.get(f"offload_{what}_device") or (section.get("device") if isinstance(section, dict) else None)
    return str(device or "none") != "none"


def _number(value: Any, default: int) -> int:
    return int(float(value)) if isinstance(value, int | float) else default


def _yaml(file: Path) -> dict[str, Any]:
    """YAML, of which JSON is a part."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as a configuration ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a configuration; `accelerate config` writes one")
    return found
