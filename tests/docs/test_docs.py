"""What the pages say exists: links, files, functions, metrics, keys and commands. Nothing is trained here."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import typing
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from rlhf.cli import app
from rlhf.locate import accelerate_config_file, recipe_file, shipped_recipes
from rlhf.objectives.presets import NOT_IN_THIS_VERSION
from rlhf.recipe import Recipe, load_recipe
from tests.recipe.conftest import model_folder

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Written in more than one place, or put together from a name: the files whose string literals are metrics.
METRIC_SOURCES = (
    *(
        f"rlhf/programs/{name}.py"
        for name in ("measure", "passes", "evaluation", "scoring", "reward_figures", "streams", "policy", "supervised")
    ),
    *("rlhf/rewards/combine.py", "rlhf/rewards/early.py", "rlhf/assemble/supervised.py", "rlhf/runtime/step_size.py"),
    *("rlhf/objectives/ppo.py", "rlhf/objectives/reinforce.py"),
)
_METRIC = re.compile(
    r"(?:reward|reward_model|kl|policy|value|loss|completion|optim|eval|time|throughput)/[a-z_<>]+(?:/[a-z_<>]+)?"
)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, *languages: str) -> list[str]:
    """Fenced code blocks of a page, of the given languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def prose(name: str) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)


# ---- links and files


def anchors(page: Path) -> set[str]:
    """The ids that headings get: lower case, punctuation out, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists() and there.is_relative_to(ROOT), f"{name}: {target}"
        assert not anchor or anchor in anchors(there), f"{name}: {target} has no such heading"


@pytest.mark.parametrize("name", NAMES)
def test_files_named_in_the_text_exist(name: str) -> None:
    pattern = r"`((?:rlhf|tests|docs|recipes|accelerate_configs|benchmarks|\.ci)/[\w./-]+)`"
    for file in re.findall(pattern, prose(name)):
        assert (ROOT / file).exists(), f"{name}: {file}"


def test_the_tree_has_every_module_once() -> None:
    tree = next(block for block in blocks("docs/architecture.md", "") if block.startswith("rlhf/\n"))
    named = re.findall(r"^ +(\w+\.py) ", tree, re.MULTILINE)
    files = [file for file in (ROOT / "rlhf").rglob("*.py") if file.name != "__init__.py"]
    assert sorted(named) == sorted(["__init__.py", *(file.name for file in files)])


# ---- functions


@lru_cache
def definitions(file: Path) -> dict[str, ast.AST]:
    """Dotted name → node of what a module defines: functions, classes and their members, assignments."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield prefix + node.target.id, node

    return dict(walk(ast.parse(file.read_text(encoding="utf-8")).body, ""))


def exists(dotted: str) -> bool:
    """Whether ``rlhf.maths.kl.k1`` or ``rlhf.rollout.Rollout`` names a module, or something that one defines."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:cut])
        file = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
        if file.is_file():
            return cut == len(parts) or ".".join(parts[cut:]) in definitions(file)
    return False


@pytest.mark.parametrize("name", NAMES)
def test_named_functions_exist(name: str) -> None:
    for dotted in re.findall(r"`(rlhf(?:\.\w+)+)(?:\(.*?\))?`", prose(name)):
        assert dotted.endswith((".yaml", ".html")) or exists(dotted), f"{name}: {dotted}"


@pytest.mark.parametrize("module", ["kl", "losses", "baselines", "returns", "variance", "logprobs", "ranking"])
def test_every_formula_has_its_place_in_the_algorithms(module: str) -> None:
    """All public functions of the maths. ``*_of`` and ``chosen`` are the same formulas on log-probabilities at hand."""
    page = text_of("docs/algorithms.md")
    names = [name for name in definitions(ROOT / "rlhf" / "maths" / f"{module}.py") if "." not in name]
    public = {name for name in names if not name.startswith("_") and not name.endswith("_of") and name[0].islower()}
    through_others = {"kl": {"kl_to_go"}, "logprobs": {"chosen"}, "baselines": {"advantages"}}
    missing = {
        name for name in public - through_others.get(module, set()) if f"rlhf.maths.{module}.{name}`" not in page
    }
    assert not missing


def test_the_quoted_loop_is_the_loop() -> None:
    page, loop = text_of("docs/algorithms.md"), text_of("rlhf/programs/policy.py")
    lines = re.findall(r"^\| \d \| .* \| `(.+)` \|$", page, re.MULTILINE)
    assert len(lines) == 6
    at = [loop.index(line) for line in lines]  # ValueError names the line that is no longer there
    assert at == sorted(at)


def test_quoted_names_in_python_blocks_are_real() -> None:
    for name in NAMES:
        for block in blocks(name, "python"):
            compile(block, name, "exec")


# ---- metrics


def metric_names(text: str) -> set[str]:
    return set(_METRIC.findall(text))


def written_by(file: str) -> set[str]:
    """Metric names in the strings of a source file; ``f"reward/{name}_mean"`` reads ``reward/<…>_mean``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text_of(file))):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "<>" for part in node.values]
            found |= {name for name in metric_names("".join(parts)) if "<>" in name}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _METRIC.fullmatch(node.value):
            found.add(node.value)
    return found


def documented() -> set[str]:
    """Every name in the first column of the tables of docs/metrics.md."""
    rows = re.findall(r"^\| (`[^|]+) \|", text_of("docs/metrics.md"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def generic(name: str) -> str:
    return re.sub(r"<\w*>", "<>", name)


def test_every_metric_that_is_written_is_explained() -> None:
    explained = {generic(name) for name in documented()}
    explained |= {re.sub(r"(?<=^loss/).+", "<>", name) for name in explained}  # f"loss/{name}" of an objective's sums
    explained |= {re.sub(r"(?<=^time/).+(?=_seconds)", "<>", name) for name in explained}  # f"time/{phase}_seconds"
    explained |= {re.sub(r"(?<=^eval/).+", "<>", name) for name in explained}  # held out, named after reward_model/…
    # sums that become reward/score_std, and the documentation of a metric in RewardSet's docstring
    internal = {"reward/score_square", "value/return_square"}
    for file in METRIC_SOURCES:
        missing = {generic(name) for name in written_by(file)} - explained - internal
        assert not missing, f"{file} writes {sorted(missing)}; explain it in docs/metrics.md"


def test_every_explained_metric_is_written() -> None:
    written = {generic(name) for file in METRIC_SOURCES for name in written_by(file)}
    # names that are put together: the phases of a step, an objective's losses, held-out pair metrics
    clock = re.findall(r'clock\("(\w+)"\)', text_of("rlhf/programs/policy.py"))
    written |= {f"time/{phase}_seconds" for phase in clock}
    sums = text_of("rlhf/objectives/reinforce.py")
    written |= {f"loss/{name}" for name in re.findall(r'"(value)": self', text_of("rlhf/objectives/ppo.py"))}
    written |= {f"loss/{name}" for name in re.findall(r'sums\["(\w+)"\]', sums)}
    written |= {"loss/instruction", "loss/sft", "loss/reward"}  # the names of the supervised objectives
    assert 'name="instruction"' in text_of("rlhf/assemble/policy.py")
    written |= {f"eval/{name.split('/')[1]}" for name in written if name.startswith("reward_model/")}
    assert {generic(name) for name in documented()} <= written


@pytest.mark.parametrize("name", NAMES)
def test_metrics_named_elsewhere_are_explained(name: str) -> None:
    explained = {generic(known) for known in documented()}
    for quoted in re.findall(r"`([^`\n]+)`", prose(name)):
        if _METRIC.fullmatch(quoted):
            assert generic(quoted) in explained, f"{name}: {quoted}"


# ---- recipe keys


def known_key(dotted: str) -> bool:
    """Whether the schema has this key; list indices stand for their entries."""
    here: type[BaseModel] | None = Recipe
    for part in dotted.split("."):
        if here is None or part not in here.model_fields:
            return here is None and not part.isdecimal()
        field = here.model_fields[part].annotation
        models = [cls for cls in _classes(field) if issubclass(cls, BaseModel)]
        here = models[0] if models else None
    return True


def _classes(annotation: object) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _classes(argument)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_keys_exist(name: str) -> None:
    sections = "|".join(Recipe.model_fields)
    for key in re.findall(rf"`((?:{sections})(?:\.\w+)+)(?:[=:][^`]*)?`", prose(name)):
        plain = ".".join(part for part in key.split(".") if not part.isdecimal())
        if plain.endswith((".py", ".md", ".yaml", ".json", ".jsonl", ".html", ".safetensors")):
            continue
        assert known_key(plain), f"{name}: {key}"


# ---- commands and recipes


def commands() -> Iterator[tuple[str, str]]:
    """(page, line) of every command in a shell block, comments cut off."""
    for name in NAMES:
        for block in blocks(name, "bash", ""):
            for line in block.splitlines():
                if re.match(r"(rlhf|make|accelerate launch|python -m rlhf|\.ci/run)( |$)", line):
                    yield name, line.split("  #")[0].strip()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with everything that commands in the pages read: earlier runs, rows, code, recipes."""
    for run in ("quickstart-sft", "quickstart-reward", "reviews-sft", "reviews-reward", "shop-sft", "shop-reward"):
        model_folder(tmp_path / "runs" / run / "final")
    for file in ("prompts", "heldout", "train", "test", "demonstrations", "preferences"):
        (tmp_path / f"{file}.jsonl").write_text('{"prompt": "a"}\n')
    for name in NAMES:
        for block in blocks(name, "yaml", "python"):
            first = re.match(r"# ([\w-]+\.(?:yaml|py))\n", block)
            if first:
                (tmp_path / first[1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_commands_can_be_typed(page: str, line: str, place: Path) -> None:
    words = shlex.split(line)
    if words[0] in ("make", ".ci/run"):
        targets = re.findall(r"^(\w+):", text_of("Makefile"), re.MULTILINE)
        assert words[0] == ".ci/run" or set(words[1:]) <= set(targets), line
        return
    if words[0] == "accelerate":
        accelerate_config_file(words[words.index("--config_file") + 1])
        assert words[words.index("-m") + 1] == "rlhf"
    arguments = words[words.index("rlhf") + 1 :]
    verb, rest = arguments[0], arguments[1:]
    shown = CliRunner().invoke(app, [verb, "--help"])
    assert shown.exit_code == 0, f"{page}: no command {verb}"
    flags = ("--shortened", "--alone", "--side-by-side", "--json")
    while option := next((word for word in rest if word.startswith("--")), None):
        assert option in shown.output, f"{page}: {verb} has no {option}"
        at = rest.index(option)
        if option == "--accelerate":
            accelerate_config_file(rest[at + 1])
        del rest[at : at + 1 + (option not in flags)]
    if verb == "recipes" and rest:
        assert rest[0] in ("show", "copy") and recipe_file(rest[1]), line
    if verb in ("train", "check", "plan"):
        name, *overrides = rest
        given = ROOT / name if (ROOT / name).is_file() else place / name
        load_recipe(str(recipe_file(str(given) if given.is_file() else name)), overrides, inputs=verb != "plan")


def test_the_recipe_of_the_readme_is_valid(place: Path) -> None:
    (shown,) = blocks("README.md", "yaml")
    ready = load_recipe("my-run.yaml")
    assert ready.objective == "reinforce" and len(shown.splitlines()) <= 20


def test_rows_of_the_readme_are_json() -> None:
    (rows,) = blocks("README.md", "json")
    columns = [set(json.loads(row)) for row in rows.splitlines()]
    assert columns == [{"messages"}, {"prompt", "chosen", "rejected"}, {"text", "label"}]


def test_what_is_said_to_be_missing_is_refused_by_name() -> None:
    assert {"kto"} <= NOT_IN_THIS_VERSION


def test_every_shipped_recipe_is_listed() -> None:
    page = text_of("docs/recipes.md")
    assert all(f"[{name}](../recipes/{name}.yaml)" in page for name in shipped_recipes())


def test_decisions_are_numbered_and_listed() -> None:
    files = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("0*.md"))
    assert [int(name[:4]) for name in files] == list(range(1, len(files) + 1))
    listed = re.findall(r"\]\((0\d+[^)]+)\)", text_of("docs/decisions/README.md"))
    assert listed == files
    for name in files:
        page = text_of(f"docs/decisions/{name}")
        assert page.startswith(f"# {int(name[:4])}. ")
        for part in ("Context", "Decision", "Consequence", "Evidence"):
            assert f"\n**{part}.** " in page, f"{name} has no {part}"


# ---- data


def test_every_format_and_kind_of_file_is_listed() -> None:
    from rlhf.data.formats import TABLE
    from rlhf.data.kinds import TABLE_KINDS, TEXT_KINDS

    page = text_of("docs/data.md")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", page, re.MULTILINE)
    listed = [(name, recognised) for name, recognised in rows if name in {entry.name for entry in TABLE}]
    assert [name for name, _ in listed] == [entry.name for entry in TABLE]  # in the order they are looked for
    for entry, (_, recognised) in zip(TABLE, listed, strict=True):
        assert all(f"`{column}`" in recognised for column in entry.columns), entry.name
    assert all(f"`.{kind}`" in page for kind in (*TEXT_KINDS, *TABLE_KINDS))


def test_the_example_format_works(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf.data.formats import to_demonstrations

    monkeypatch.syspath_prepend(place)
    rows = [{"riddle": "What has keys?", "solution": "A piano."}, {"riddle": "No.", "solution": "x"}]
    (example,) = to_demonstrations(rows, format="riddles:Riddle")
    assert (example.prompt.text, example.completion) == ("Riddle: What has keys?\nSolution:", " A piano.")


# ---- the objective that the architecture page shows


def test_the_example_objective_works(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts of two completions; the better one of each is imitated, with weight 1 / 4 completions."""
    import torch

    from rlhf.interfaces import Alone, PolicyObjective, TokenStats, TrainState
    from rlhf.rollout import Prompt, Rollout

    monkeypatch.syspath_prepend(place)
    import best_of_k  # type: ignore[import-not-found]

    recipe = load_recipe("quickstart/reinforce", ["objective=best_of_k:BestOfK", "kl.beta=2.0"])
    assert str(recipe.output_dir) == "runs/quickstart-best_of_k-BestOfK"
    objective = best_of_k.BestOfK(recipe)
    members = {name for base in PolicyObjective.__mro__ for name in vars(base) if not name.startswith("_")}
    assert {"prepare", "loss_sum", "count", "needs", "unit"} <= members
    assert all(hasattr(objective, name) for name in members)
    assert list(inspect.signature(objective.prepare).parameters) == ["rollout", "state", "collective"]
    rollout = Rollout.from_ids(
        [[2, 3]] * 4,
        [[5, 1], [6, 1], [7, 1], [8, 1]],
        group=[0, 0, 1, 1],
        prompts=tuple(Prompt(row_id=row // 2, text="x") for row in range(4)),
        texts=("", "", "", ""),
        sample=torch.tensor([0, 1, 0, 1]),
        finished=torch.ones(4, dtype=torch.bool),
        rewards=torch.tensor([1.0, 3.0, 2.0, 0.0]),
        ref_logprobs=torch.full((4, 2), -1.0),
    )
    prepared, _ = objective.prepare(rollout, TrainState(), Alone())
    assert prepared.advantages.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert int(objective.count(prepared)) == 4
    sums = objective.loss_sum(TokenStats(logprobs=torch.full((4, 2), -0.5)), prepared)
    assert float(sums["policy"]) == 2.0  # two completions of two tokens, −log π = .5 each
    assert float(sums["kl_loss"]) == 2.0 * 4 * 0.5  # β · four completions · ½(2 · .5)²
