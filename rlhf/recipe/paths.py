"""What a recipe points at on this machine: missing inputs, folders that a run would overwrite, secrets in the text.

Only ``stat`` and small JSON files; hub ids are left alone.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rlhf.data.kinds import SUFFIXES_IN_WORDS, suffix_of
from rlhf.errors import UserError
from rlhf.locate import command_name, shipped_recipes
from rlhf.objectives.presets import is_dotted
from rlhf.recipe.marks import KeyPath, Problem, read_file
from rlhf.recipe.reading import on_policy, quantized, reads, reward_sources
from rlhf.recipe.schema import DataSource, Recipe, fill
from rlhf.recipe.sections import RewardModel, RewardSource, RolloutSettings, Run
from rlhf.recipe.servers import token_of
from rlhf.recipe.validate import Rule
from rlhf.recipe.wording import is_secret, near, shown

Place = Literal["function", "local", "hub", "unclear"]

ADAPTER = "adapter"  # rlhf.models.adapters

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_OTHER_SUFFIX = re.compile(r"\.(txt|gz|zip|xlsx|jinja|ya?ml|safetensors)$", re.IGNORECASE)
_ENVIRONMENT = re.compile(r"\$\{?\w")


def place(path: str) -> Place:
    """What a path in a recipe means: code, something on this disk, or a hub id."""
    if is_dotted(path):
        return "function"
    here = Path(path).expanduser()
    first = Path(path).parts[0] if Path(path).parts else "."
    if path.startswith(("/", "./", "../", "~")) or here.exists() or path.count("/") > 1:
        return "local"
    if suffix_of(path) or _OTHER_SUFFIX.search(path):
        return "local"
    if len(Path(path).parts) > 1 and Path(first).is_dir():
        return "local"
    return "hub" if _HUB_ID.fullmatch(path) else "unclear"


def secrets(value: Any, path: KeyPath = ()) -> Iterator[Problem]:
    """Strings anywhere in the values that look like access tokens."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from secrets(entry, (*path, str(key)))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from secrets(entry, (*path, index))
    elif isinstance(value, str) and path and is_secret(value, str(path[-1])):
        yield Problem(
            path,
            "looks like an access token, and recipes are copied into runs and logs; put it into an environment "
            "variable (the hub reads HF_TOKEN, wandb WANDB_API_KEY) and revoke this one if it was shared",
        )


def local_inputs(recipe: Recipe) -> dict[str, Path]:
    """Dotted key → file or folder of this machine that the recipe reads: models, tokenizers, rows."""
    named = [*_model_paths(recipe), *_data_paths(recipe)]
    found = {".".join(map(str, key)): Path(value).expanduser() for key, value in named if place(value) == "local"}
    found |= {f"{'.'.join(map(str, here))}.path/{ADAPTER}": folder for here, folder in _adapters(recipe)}
    return {key: path for key, path in found.items() if path.exists()}


def path_rules(folder: Path | None) -> list[Rule]:
    """The rules that look at the disk. ``folder``: where the recipe lies; its neighbours may make what it needs."""

    def models_exist(recipe: Recipe) -> Iterator[Problem]:
        for key, value in _model_paths(recipe):
            yield from _model_problems(key, value, folder)

    return [
        _output_is_a_place_of_its_own,
        _no_variables,
        _data_exists,
        models_exist,
        _quantized_models_are_whole,
        _adapters_are_kept,
        _tokens_are_set,
        _code_exists,
        _fits_the_context,
    ]


def _output_is_a_place_of_its_own(recipe: Recipe) -> Iterator[Problem]:
    key: KeyPath = ("run", "output_dir")
    given = fill(recipe.run.output_dir, recipe.run.name, recipe.objective)
    braces = re.findall(r"\{[^}]*\}?|\}", given)
    if not given.strip() or "\0" in given:
        yield Problem(key, "is empty; leave it out for runs/{name}-{objective}")
        return
    if braces:
        yield Problem(key, f"{shown(braces[0])} is no placeholder; only {{name}} and {{objective}} are")
        return
    output = Path(given).expanduser().resolve()
    if Path.cwd().is_relative_to(output) or Path.home().is_relative_to(output):
        yield Problem(key, f"{shown(given)} holds the working or home directory; a run needs a folder of its own")
    elif any((output / mark).exists() for mark in (".git", "setup.cfg", "pyproject.toml")):
        yield Problem(key, f"{shown(given)} is the root of a repository; a run needs a folder of its own")
    elif output.is_file() or any(parent.is_file() for parent in output.parents):
        yield Problem(key, f"{shown(given)} is, or lies under, a file; name a folder")
    else:
        yield from _overlap(recipe, output)


def _overlap(recipe: Recipe, output: Path) -> Iterator[Problem]:
    for key, value in _model_paths(recipe):
        source = Path(value).expanduser()
        if source.is_dir() and (output == source.resolve() or output.is_relative_to(source.resolve())):
            name = ".".join(map(str, key))
            yield Problem(
                ("run", "output_dir"), f"{shown(str(output))} lies in {name}: the run would write into its input"
            )
        elif source.is_dir() and source.resolve().is_relative_to(output):
            name = ".".join(map(str, key))
            yield Problem(("run", "output_dir"), f"{shown(str(output))} holds {name}: that folder is another run's")


def _no_variables(recipe: Recipe) -> Iterator[Problem]:
    values: list[tuple[KeyPath, str]] = [(("run", "output_dir"), recipe.run.output_dir)]
    for key, value in (*values, *_model_paths(recipe), *_data_paths(recipe)):
        if _ENVIRONMENT.search(value):
            yield Problem(
                key,
                f"{shown(value)}: variables are not expanded in a recipe; write the path, or override the key on the "
                "command line, where the shell expands it",
            )


def _data_exists(recipe: Recipe) -> Iterator[Problem]:
    for key, value in _data_paths(recipe):
        yield from _data_problems(key, value)


def _tokens_are_set(recipe: Recipe) -> Iterator[Problem]:
    servers: list[tuple[KeyPath, RewardSource | RolloutSettings]] = [*reward_sources(recipe)]
    for here, server in [*servers, (("rollout",), recipe.rollout)]:
        if server.url is None or server.token_env is None:
            continue
        try:
            token_of(server.token_env)
        except UserError as error:
            yield Problem((*here, "token_env"), str(error))


def _code_exists(recipe: Recipe) -> Iterator[Problem]:
    template = recipe.policy.chat_template
    if template != "auto" and not Path(template).expanduser().is_file():
        yield Problem(("policy", "chat_template"), f"no file {shown(template)}; auto = the model's own")
    for key, call in _calls(recipe):
        if not _importable(call):
            yield Problem(key, _not_importable(call))


def _data_problems(key: KeyPath, value: str) -> Iterator[Problem]:
    where, file = place(value), Path(value).expanduser()
    if _ENVIRONMENT.search(value):
        return
    if where == "function" and not _importable(value):
        yield Problem(key, _not_importable(value))
    elif where == "unclear":
        yield Problem(key, f"{shown(value)} is no file, hub id (owner/name) or package.module:function")
    elif where == "local" and not file.exists():
        yield Problem(key, f"{shown(value)} does not exist{_neighbours(file)}")
    elif where == "local" and file.is_file() and suffix_of(file) is None:
        yield Problem(key, f"{shown(value)}: files end in {SUFFIXES_IN_WORDS}; convert it, one JSON object per line")
    elif where == "local" and file.is_file() and file.stat().st_size == 0:
        yield Problem(key, f"{shown(value)} is an empty file")


def _model_problems(key: KeyPath, value: str, folder: Path | None) -> Iterator[Problem]:
    where, path = place(value), Path(value).expanduser()
    if _ENVIRONMENT.search(value):
        return
    wanted = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if key[-1] != "tokenizer":
        wanted = ("config.json", "adapter_config.json", "params.json")
    if where in ("function", "unclear"):
        yield Problem(key, f"{shown(value)} is neither a folder nor a hub id (owner/name)")
    elif where == "local" and not path.exists():
        maker = made_by(path, folder)
        more = f" yet; `rlhf train {command_name(maker)}` makes it" if maker else _neighbours(path)
        yield Problem(key, f"{shown(value)} does not exist{more}")
    elif where == "local" and not any((path / name).is_file() for name in wanted):
        final = "; did you mean its final/?" if (path / "final").is_dir() else ""
        yield Problem(key, f"{shown(value)} holds no {wanted[0]}, so it is no model folder{final}")


def _quantized_models_are_whole(recipe: Recipe) -> Iterator[Problem]:
    for here, path in quantized(recipe):
        folder = Path(path or "").expanduser()
        if path and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            yield Problem(
                (*here, "quantize"),
                f"{shown(path)} is an adapter, and quantized weights take none in; `rlhf merge {path} --output FOLDER` "
                "writes the whole model",
            )


def _adapters_are_kept(recipe: Recipe) -> Iterator[Problem]:
    for here, folder in _adapters(recipe):
        if not folder.parent.exists() and place(str(folder.parent)) == "local":
            continue  # told already
        if not (folder / "adapter_config.json").is_file():
            yield Problem(
                (*here, "placement"),
                f"no adapter in {shown(str(folder))}: policy_base needs the folder of a reward model that was trained "
                "here with policy.lora; set auto",
            )


def _adapters(recipe: Recipe) -> Iterator[tuple[KeyPath, Path]]:
    """Key of a reward model that lies on the policy's base, and the folder of its adapter."""
    for here, source in reward_sources(recipe):
        if isinstance(source, RewardModel) and source.placement == "policy_base" and source.path is not None:
            yield here, Path(source.path).expanduser() / ADAPTER


def made_by(path: Path, folder: Path | None) -> Path | None:
    """The shipped recipe, or the neighbour of this one, whose run leaves ``path`` (``<output_dir>/final``)."""
    near_by = sorted(folder.glob("*.yaml"))[:20] if folder else []
    for file in (*near_by, *shipped_recipes().values()):
        try:
            values = read_file(file).value
        except UserError:
            continue
        run, objective = values.get("run"), values.get("objective")
        if not isinstance(run, dict) or not isinstance(objective, str) or not isinstance(run.get("name"), str):
            continue
        output = str(run.get("output_dir", Run.model_fields["output_dir"].default))
        if (Path(fill(output, run["name"], objective)) / "final").absolute() == path.absolute():
            return file
    return None


def _fits_the_context(recipe: Recipe) -> Iterator[Problem]:
    if not on_policy(recipe) or recipe.policy.path is None:
        return
    context = _context_length(Path(recipe.policy.path).expanduser() / "config.json")
    prompt = recipe.data.prompt_tokens or recipe.data.max_prompt_tokens
    new = recipe.rollout.max_new_tokens
    if context is not None and prompt + new > context:
        name = "prompt_tokens" if recipe.data.prompt_tokens else "max_prompt_tokens"
        yield Problem(
            ("rollout", "max_new_tokens"),
            f"{new} after a prompt of up to {prompt} (data.{name}) is longer than the {context} positions that "
            "policy.path was made for; lower one of them",
        )


def _context_length(config: Path) -> int | None:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        values = values.get("text_config", values)
        length = values.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return length if isinstance(length, int) and length > 0 else None


def _model_paths(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    if recipe.policy.path is not None:
        yield ("policy", "path"), recipe.policy.path
    if recipe.policy.tokenizer is not None and recipe.policy.scratch is not None:
        yield ("policy", "tokenizer"), recipe.policy.tokenizer
    if reads(recipe, "reference") and recipe.reference.path is not None:
        yield ("reference", "path"), recipe.reference.path
    for here, source in reward_sources(recipe):
        if source.path is not None:
            yield (*here, "path"), source.path


def _data_paths(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    for key, source in _sources(recipe):
        yield (*key, "path"), source.path


def _sources(recipe: Recipe) -> Iterator[tuple[KeyPath, DataSource]]:
    instruction = reads(recipe, "instruction") and recipe.instruction.coefficient > 0
    for name in ("train", "instruction", "eval") if instruction else ("train", "eval"):
        for index, source in enumerate(getattr(recipe.data, name)):
            yield ("data", name, index), source


def _calls(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    if is_dotted(recipe.objective):
        yield ("objective",), recipe.objective
    if reads(recipe, "reward"):
        for index, function in enumerate(recipe.reward.functions):
            yield ("reward", "functions", index, "call"), function.call
    if on_policy(recipe):
        for index, call in enumerate(recipe.eval.functions):
            yield ("eval", "functions", index), call
    for key, source in _sources(recipe):
        if is_dotted(source.format):
            yield (*key, "format"), source.format


def _importable(call: str) -> bool:
    """Whether the top package can be found; nothing is imported, because that may take seconds."""
    top = call.split(":")[0].split(".")[0]
    if Path(f"{top}.py").is_file() or Path(top).is_dir():
        return True
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False


def _not_importable(call: str) -> str:
    top = call.split(":")[0].split(".")[0]
    return f"{shown(call)}: no module {top} here; run from its folder, or install it with pip"


def _neighbours(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (nor does the folder {shown(str(parent))})"
    names = _names(parent.iterdir())
    close = near(path.name, names)
    return f"; did you mean {parent / close}?" if close else ""


def _names(entries: Iterable[Path]) -> list[str]:
    return [entry.name for _, entry in zip(range(1000), entries, strict=False)]
