"""``rlhf merge``: one model from several that were trained from the same start, or from a base and its adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from rlhf.errors import ExitCode, UserError
from rlhf.maths import interpolation
from rlhf.models import load
from rlhf.models.merge import Folder, merge


def main(
    models: Sequence[str], out: Path, *, weights: Sequence[float], base: str | None, slerp: float | None
) -> ExitCode:
    """Averages the models' weights into ``out``. slerp: along the arc between two models' ways from ``base``.

    A single one is an adapter, which is added to its base. Raises UserError where the models do not belong together, or
    the settings do not.
    """
    if out.exists():
        raise UserError(f"--output {out}: is there already; name another folder, or remove it")
    if len(models) == 1:
        return _with_its_base(models[0], out)
    _refuse(models, weights, base, slerp)
    folders = [Folder.of(path) for path in (*models, *([base] if base is not None else []))]
    for other in folders[1:]:
        folders[0].refuse_stranger(other)
    shares = list(weights) or ([1.0] * len(models) if slerp is None else [1 - slerp, slerp])
    told = _told(models, shares, base, slerp)
    merge(folders, out, _combine(shares, slerp), card=_CARD.format(told=told), config=_centre(folders, shares))
    print(f"{out}: {told}")
    return ExitCode.DONE


def _with_its_base(path: str, out: Path) -> ExitCode:
    """An adapter's folder as a whole model."""
    if not (Path(path) / "adapter_config.json").is_file():
        raise UserError(f"{path}: is one model and no adapter; a mean needs two or more")
    model, tokenizer = load.load_causal_lm(path, what="rlhf merge"), load.load_tokenizer(path, what="rlhf merge")
    load.export(model, tokenizer, out, stop_ids=(), card=_CARD.format(told=f"{path}, an adapter, added to its base"))
    print(f"{out}: {path} with its base")
    return ExitCode.DONE


def _refuse(models: Sequence[str], weights: Sequence[float], base: str | None, slerp: float | None) -> None:
    if weights and len(weights) != len(models):
        raise UserError(f"--weight was given {len(weights)} times for {len(models)} models; give one each, or none")
    if weights and abs(sum(weights)) < 1e-12:
        raise UserError(f"--weight {' '.join(map(str, weights))}: they add up to 0, so their mean is not defined")
    if (slerp is None) != (base is None):
        raise UserError("--slerp is an arc around the model that both were trained from: give --slerp and --base")
    if slerp is not None and (len(models) != 2 or weights):
        raise UserError("--slerp is between two models, at one place: give two, and no --weight")


def _combine(weights: Sequence[float], slerp: float | None) -> Callable[[Sequence[Tensor]], Tensor]:
    if slerp is None:
        return lambda values: interpolation.linear(values, weights)
    return lambda values: interpolation.slerp(values[2], values[0], values[1], slerp)


def _centre(folders: Sequence[Folder], weights: Sequence[float]) -> dict[str, float]:
    """What reward models subtract from their scores is averaged with them."""
    centres = [folder.config.get("reward_center") for folder in folders[: len(weights)]]
    if all(centre is None for centre in centres):
        return {}
    total = sum(weight * float(centre or 0.0) for weight, centre in zip(weights, centres, strict=True))
    return {"reward_center": total / sum(weights)}


def _told(models: Sequence[str], weights: Sequence[float], base: str | None, slerp: float | None) -> str:
    if slerp is not None:
        return f"{slerp:g} of the way along the arc from {models[0]} to {models[1]}, around {base}"
    return "the mean of " + ", ".join(f"{weight:g} × {path}" for path, weight in zip(models, weights, strict=True))


_CARD = "---\nlibrary_name: transformers\ntags: [rlhf, merge]\n---\n\nWeights: {told} (`rlhf merge`).\n"
