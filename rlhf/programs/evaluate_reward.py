"""A reward model on preference rows: the figures, by category too, as a table and as plain values for a JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf.assemble import data, models
from rlhf.data import load
from rlhf.data.examples import Demonstration, Preference
from rlhf.errors import UserError
from rlhf.maths.ranking import Estimate
from rlhf.models.chat import render_completion
from rlhf.models.load import load_tokenizer
from rlhf.programs import reward_bench
from rlhf.programs import reward_figures as figures
from rlhf.recipe import Recipe
from rlhf.rewards.model import RewardModel, load_reward_model

SUBSET = "subset"  # RewardBench's column; rows that have it are always shown by it
Categories = Mapping[str, tuple[int, Estimate]]


def evaluate(recipe: Recipe, by: Sequence[str]) -> dict[str, Any]:
    """Rows, then the model, then one score a completion; prints the table and returns everything for the file."""
    tokenizer = load_tokenizer(str(recipe.policy.path), what="reward model")
    pairs, labelled, told = read_rows(recipe, tokenizer)
    for line in told:
        print(line, flush=True)
    columns = list(dict.fromkeys([*by, *([SUBSET] if any(SUBSET in pair.prompt.columns for pair in pairs) else [])]))
    has_columns(pairs, columns)
    if getattr(tokenizer, "chat_template", None) and any(pair.prompt.text for pair in pairs):
        print(
            "remark: prompts are plain text, which no chat template touches; data.eval.0.format=chat makes them turns"
        )
    model = load_reward_model(
        str(recipe.policy.path),
        device="cuda" if torch.cuda.is_available() else "cpu",
        compute_dtype=models.compute_dtype(recipe),
        microbatch_tokens=recipe.batch.microbatch_tokens,
    )
    rows = figures.held_out(pairs, labelled or None)
    scores, lengths = score(rows, model)
    found = figures.figures(rows, scores, lengths)
    groups = {name: figures.by_category(rows, scores, name) for name in columns}
    sections = reward_bench.sections(groups.get(SUBSET, {}))
    show(found, groups, sections)
    return {
        "data": told,
        "figures": found,
        "by": {name: _plain(group) for name, group in groups.items()},
        "sections": _plain(sections),
    }


def read_rows(recipe: Recipe, tokenizer: Any) -> tuple[list[Preference], list[Demonstration], list[str]]:
    """(pairs, labelled texts, one line a source). No prompt is too long here: what the model has no positions for is
    counted as unscorable. Raises UserError."""
    sources = data.sources(recipe.data.eval)
    pairs, report = load.load_preferences(
        sources, tokenizer=tokenizer, system_role=recipe.data.system_role, seed=recipe.run.seed
    )
    return pairs, load.load_labelled(sources, seed=recipe.run.seed), report.lines()


def has_columns(pairs: Sequence[Preference], wanted: Sequence[str]) -> None:
    """Raises UserError for a column that no pair has."""
    present = sorted({name for pair in pairs for name in pair.prompt.columns})
    for name in wanted:
        if name not in present:
            known = ", ".join(present) or "none beside the texts"
            raise UserError(f"--by {name}: the rows have no such column; they have {known}")


def score(rows: figures.HeldOut, model: RewardModel) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, tokens) of every completion, as a policy run would score it."""
    scores = model.score_texts([prompt for prompt, _ in rows.items], [text for _, text in rows.items])
    tokens = [len(render_completion(model.tokenizer, prompt, text)) for prompt, text in rows.items]
    return scores.double(), torch.tensor(tokens, dtype=torch.float64)


_ROWS = (  # name, what it is called in the table, its error
    ("eval/accuracy", "accuracy", "eval/accuracy_error"),
    ("eval/auc", "all positive × negative texts (AUC)", "eval/auc_error"),
    ("eval/length_accuracy", "prefer the longer one", None),
    ("eval/position_accuracy", "prefer the one shown first", None),
    ("eval/length_correlation", "correlation of score and length", None),
    ("eval/calibration_error", "expected calibration error", None),
    ("eval/margin", "margin", None),
    ("eval/score_mean", "score", None),
)


def show(found: Mapping[str, float], groups: Mapping[str, Categories], sections: Categories) -> None:
    """Prints the figures as tables. Names from the rows are escaped."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    lines = [(label, _shown(found, name, error)) for name, label, error in _ROWS if name in found]
    dropped = int(found["eval/unscorable_pairs"])
    more = f", {dropped} more than the context holds" if dropped else ""
    console.print(_table(f"{int(found['eval/pairs'])} pairs{more}", ("", "± standard error"), lines))
    buckets = [
        (name, f"{found[f'eval/confidence/{name}']:.3f}", f"{found[f'eval/accuracy/{name}']:.3f}")
        for name in figures.CONFIDENCE
        if f"eval/confidence/{name}" in found
    ]
    if buckets:
        console.print(_table("quarters by |margin|", ("confidence", "claimed σ(|margin|)", "accuracy"), buckets))
    for name, group in {**groups, "section": sections}.items():
        if group:
            body = [(key, str(count), f"{value:.3f} ± {error:.3f}") for key, (count, (value, error)) in group.items()]
            console.print(_table(f"by {name}", (name, "pairs", "accuracy"), body))
    if all(name in sections for name in reward_bench.SECTIONS):
        mean = sum(sections[name][1].value for name in reward_bench.SECTIONS) / len(reward_bench.SECTIONS)
        console.print(f"mean of the four sections: {mean:.3f}")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from rlhf.tracking.console import printable

    table = Table(title=Text(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _shown(found: Mapping[str, float], name: str, error: str | None) -> str:
    more = f" ± {found[error]:.3f}" if error is not None and error in found else ""
    return f"{found[name]:.3f}{more}"


def _plain(group: Categories) -> dict[str, dict[str, float]]:
    return {
        name: {"pairs": count, "accuracy": estimate.value, "error": estimate.error}
        for name, (count, estimate) in group.items()
    }
