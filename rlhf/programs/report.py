"""``rlhf report RUN…``: one self-contained page about a run, or about several side by side.

Reads recipe.yaml, run.json, metrics.jsonl and samples.jsonl and nothing else. Model text, prompts and names are
escaped by the template, control characters are spelled out, and the page forbids scripts and every outside request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from rlhf.errors import ExitCode, UserError
from rlhf.programs.outcome import Change, Outcome, compare
from rlhf.programs.report_advice import advice, verdict
from rlhf.programs.report_record import RunRecord, read_run
from rlhf.runtime.manifest import write_text_atomic
from rlhf.tracking.redact import printable

REPORT, COMPARISON = "report.html", "comparison.html"
PAIRS_SHOWN = 12
TRAINING_SAMPLES_SHOWN = 8
_LONGEST_TEXT = 6000  # characters of one completion on the page

# (title, unit or remark, metric of training rollouts, metric of held-out prompts)
_CURVES = (
    ("Reward", "what is trained on", "reward/score_mean", "eval/reward_mean"),
    ("{yardstick}", "logged, never trained on", "reward/{yardstick}_mean", "eval/{yardstick}_mean"),
    ("KL to the reference", "nats per completion", "kl/reference", "eval/kl_reference"),
    ("Length", "tokens per completion", "completion/length_mean", "eval/length_mean"),
    ("Entropy", "nats per token", "policy/entropy", ""),
    ("Accuracy", "chosen scored above rejected", "reward_model/accuracy", "eval/accuracy"),
    ("Margin", "chosen minus rejected score", "reward_model/margin", "eval/margin"),
)
_LOSS = ("Loss", "", "{loss}", "eval/loss")  # only where there is no reward to look at
_SETTINGS = {
    "objective": "objective",
    "policy.path": "policy",
    "policy.scratch.family": "policy, from scratch",
    "reference.path": "reference",
    "reward.models.0.path": "reward model",
    "reward.models.0.url": "reward server",
    "kl.beta": "KL coefficient β",
    "kl.estimator": "KL estimator",
    "kl.credit": "KL credit",
    "reinforce.baseline": "baseline",
    "rollout.samples_per_prompt": "samples per prompt k",
    "rollout.max_new_tokens": "longest completion, tokens",
    "rollout.temperature": "temperature",
    "batch.prompts_per_step": "prompts per step",
    "optim.lr": "learning rate",
    "run.steps": "steps",
    "run.seed": "seed",
}
_NAMES = {"reward": "reward", "kl": "KL, nats", "tokens": "length, tokens"}


def main(runs: Sequence[Path]) -> ExitCode:
    """One run: its report. Several: a page that compares them. Prints where the page is.

    Raises UserError for a directory that holds no run.
    """
    path = write_report(runs[0]) if len(runs) == 1 else write_comparison(runs)
    print(f"report: {path}")
    return ExitCode.DONE


def write_report(run: Path) -> Path:
    """Writes ``run/report.html`` and returns its path. Raises UserError where there is no run."""
    record = read_run(run)
    outcome = compare(record.samples)
    pairs = outcome.pairs if outcome else []
    notes = [f"{record.broken} broken lines were passed over"] if record.broken else []
    text = _render(
        title=record.name,
        runs=[_header(record, 0)],
        verdict=verdict(record, outcome),
        headline=[_headline(name, outcome.changes[name]) for name in _ranked([outcome])] if outcome else [],
        ends=[] if outcome else _ends(record),
        pictures=_pictures([record]),
        pairs=[_pair(before, after) for before, after in pairs[:PAIRS_SHOWN]],
        pairs_total=len(pairs),
        training=[_sample(row) for row in _training_rows(record)],
        settings=_settings(record),
        recipe=printable(record.recipe_text),
        facts=_facts(record),
        advice=advice(record, outcome),
        notes=notes,
    )
    return _write(run / REPORT, text)


def write_comparison(runs: Sequence[Path], target: Path | None = None) -> Path:
    """Writes one page with the curves of several runs laid over each other.

    target: default ``comparison.html`` beside the runs if they share a parent, else in the working directory.
    """
    records = [read_run(run) for run in runs]
    if len(records) < 2:
        raise UserError("one run was given, a comparison needs two or more; name several run directories")
    outcomes = [compare(record.samples) for record in records]
    rows = [
        (
            _NAMES.get(name, name),
            [_headline(name, found.changes[name]) if found and name in found.changes else None for found in outcomes],
        )
        for name in _ranked(outcomes)
    ]
    text = _render(
        title=" · ".join(record.name for record in records),
        runs=[_header(record, index) for index, record in enumerate(records)],
        table=rows,
        differences=_differences(records),
        pictures=_pictures(records),
        side_by_side=_side_by_side([found.pairs if found else [] for found in outcomes]),
        notes=[],
    )
    parents = {run.resolve().parent for run in runs}
    default = (parents.pop() if len(parents) == 1 else Path.cwd()) / COMPARISON
    return _write(target or default, text)


def _render(**page: Any) -> str:
    """Everything from outside is escaped by the template; only the pictures come in as markup."""
    environment = Environment(
        loader=PackageLoader("rlhf.programs", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(page)


def _write(path: Path, text: str) -> Path:
    try:
        write_text_atomic(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}", ExitCode.DISK) from error
    return path


def _pictures(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Every known curve that a run has, then reward over KL. matplotlib is imported only here."""
    from rlhf.programs.report_pictures import Curve, curves, frontier

    yardstick = next((record.yardstick for record in records if record.yardstick), None)
    rewarded = any(record.has("reward/score_mean") for record in records)
    loss = next((record.loss for record in records if record.loss), None)
    drawn = []
    for number, spec in enumerate(_CURVES if rewarded else (_LOSS, *_CURVES)):
        title, unit, trained, held_out = (part.format(yardstick=yardstick, loss=loss) for part in spec)
        lines = [
            Curve(x=x, y=y, series=index, dots=dots)
            for index, record in enumerate(records)
            for key, dots in ((trained, False), (held_out, True))
            for x, y in [record.curve(key)]
            if x
        ]
        if lines:
            last = [(record.path, record.last(trained, held_out)) for record in records]
            dots = any(line.dots for line in lines) and any(not line.dots for line in lines)
            drawn.append(_picture(title, unit, curves(f"c{number}", lines), [value for _, value in last], dots))
    bought = f"reward/{yardstick}_mean" if yardstick else "reward/score_mean"
    paths = [
        Curve(x=x, y=y, series=index)
        for index, record in enumerate(records)
        for x, y in [record.against("kl/reference", bought)]
        if x
    ]
    if paths:
        unit = "later steps are stronger"
        drawn.append(_picture(f"{yardstick or 'Reward'} against KL", unit, frontier("k", paths), [], False))
    return drawn


def _picture(title: str, unit: str, svg: Any, last: Sequence[float | None], dots: bool) -> dict[str, Any]:
    shown = [number(value) for value in last if value is not None]
    title = printable(title[:1].upper() + title[1:])
    return {"title": title, "unit": unit, "svg": svg, "last": shown if len(shown) == 1 else [], "dots": dots}


def _ranked(outcomes: Sequence[Outcome | None]) -> list[str]:
    """Names of changes: what counts first. A single reward source is the reward, and is not shown twice."""
    changes = [found.changes for found in outcomes if found]
    names = dict.fromkeys(name for found in changes for name in found)
    twins = {n for n in names if n != "reward" and all(found.get(n) == found.get("reward") for found in changes)}
    order = {"gold": 0, "reward": 1, "kl": 8, "tokens": 9}
    return sorted((name for name in names if name not in twins), key=lambda name: order.get(name, 5))


def _headline(name: str, change: Change) -> dict[str, Any]:
    sigmas = abs(change.difference) / change.error if change.error > 0 else float("inf") * bool(change.difference)
    return {
        "name": printable(_NAMES.get(name, name)),
        "before": number(change.before),
        "after": number(change.after),
        "difference": number(change.difference) if change.difference < 0 else f"+{number(change.difference)}",
        "error": number(change.error),
        "prompts": change.prompts,
        "clear": sigmas > 2,
        "up": change.difference >= 0,
    }


def _ends(record: RunRecord) -> list[dict[str, Any]]:
    """First and last tenth of the main curves, for runs that evaluated nothing before and after."""
    keys = {
        "loss": record.loss or "",
        "held-out loss": "eval/loss",
        "accuracy": "reward_model/accuracy",
        "reward": "reward/score_mean",
        "KL, nats": "kl/reference",
    }
    found = []
    for name, key in keys.items():
        _, values = record.curve(key)
        if values and not (name == "loss" and record.has("reward/score_mean")):
            count = max(len(values) // 10, 1)
            first, last = sum(values[:count]) / count, sum(values[-count:]) / count
            found.append({"name": name, "before": number(first), "after": number(last)})
    return found


def _header(record: RunRecord, index: int) -> dict[str, Any]:
    status = str(record.run.get("status", "unknown"))
    return {
        "name": printable(record.name, newlines=False),
        "objective": printable(str(record.settings.get("objective", "")), newlines=False),
        "status": status if status in ("running", "finished", "failed", "preempted") else "unknown",
        "reason": printable(str(record.run.get("exit_reason") or ""), newlines=False) if status != "finished" else "",
        "series": index % 6,
        "steps": record.steps,
    }


def _settings(record: RunRecord) -> list[tuple[str, str]]:
    """The settings that this objective reads."""
    objective = record.settings.get("objective")
    idle = {"reinforce"} if objective != "reinforce" else set()
    if not record.has("kl/reference"):
        idle |= {"reference", "reward", "kl", "reinforce", "rollout"}
    keys = {key: label for key, label in _SETTINGS.items() if key.partition(".")[0] not in idle}
    found = [(label, record.settings.get(key)) for key, label in keys.items()]
    return [(label, _cell(value)) for label, value in found if value is not None]


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    run = record.run
    versions: Any = run.get("versions")
    resumes: Any = run.get("resumes")
    times = len(resumes) if isinstance(resumes, list) else 0
    facts = [
        ("command", run.get("command")),
        ("started", run.get("started")),
        ("took", _took(run)),
        ("resumed", f"{times} times" if times > 1 else "once" if times else None),
        ("completions per second", _mean(record, "throughput/completions_per_second")),
        ("seconds per step", _mean(record, "time/step_seconds")),
        ("code", str(run.get("commit"))[:12] if run.get("commit") else None),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None),
    ]
    return [(name, printable(str(value))) for name, value in facts if value]


def _took(run: Mapping[str, Any]) -> str | None:
    try:
        seconds = (datetime.fromisoformat(run["ended"]) - datetime.fromisoformat(run["started"])).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _mean(record: RunRecord, key: str) -> str | None:
    _, values = record.curve(key)
    return number(sum(values) / len(values)) if values else None


def _training_rows(record: RunRecord) -> list[Mapping[str, Any]]:
    rows = [row for row in record.samples if row.get("phase", "train") == "train"]
    return rows[-TRAINING_SAMPLES_SHOWN:]


def _pair(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": _text(before.get("prompt")), "before": _sample(before), "after": _sample(after)}


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    scores = row.get("scores") if isinstance(row.get("scores"), dict) else {}
    sources = [(name, score) for name, score in (scores or {}).items() if score != row.get("reward")]
    numbers = [("reward", row.get("reward")), *sources, ("KL", row.get("kl"))]
    return {
        "step": row.get("step"),
        "prompt": _text(row.get("prompt")),
        "completion": _text(row.get("completion")),
        "cut": row.get("finished") is False,
        "numbers": [
            (printable(str(name), newlines=False), number(value)) for name, value in numbers if _is_number(value)
        ],
    }


def _side_by_side(pairs: Sequence[Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """Prompts that every run was evaluated on: the first run's start, then each run's end."""
    after = [{_text(b.get("prompt")): a for b, a in found} for found in pairs]
    shared = [(b, _text(b.get("prompt"))) for b, _ in (pairs[0] if pairs else [])]
    shared = [(b, prompt) for b, prompt in shared if all(prompt in found for found in after)]
    return [
        {"prompt": prompt, "before": _sample(b), "after": [_sample(found[prompt]) for found in after]}
        for b, prompt in shared[: PAIRS_SHOWN // 2]
    ]


def _differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ; where a run lies and what it is called says nothing."""
    keys = dict.fromkeys(key for record in records for key in record.settings)
    boring = ("run.name", "run.output_dir", "run.resume", "tracking.")
    rows = [
        (key, [_cell(record.settings.get(key)) for record in records]) for key in keys if not key.startswith(boring)
    ]
    return [(printable(key), cells) for key, cells in rows if len(set(cells)) > 1]


def _text(value: Any) -> str:
    """A prompt or completion as shown: message lists by role, control characters spelled out, endless ones cut."""
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict)]
        value = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)
    text = "" if value is None else str(value)
    shown = (
        text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}… ({len(text) - _LONGEST_TEXT} more characters)"
    )
    return printable(shown)


def _cell(value: Any) -> str:
    return "not set" if value is None else printable(str(value), newlines=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: float) -> str:
    """Three significant digits, without an exponent where people would not write one."""
    if value == 0 or 0.001 <= abs(value) < 100_000:
        digits = 3 - len(str(int(abs(value)))) if abs(value) >= 1 else 3
        shown = f"{value:.{max(digits, 0)}f}"
    else:
        shown = f"{value:.2g}"
    return shown.replace("-", "\u2212")
