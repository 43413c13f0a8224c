"""What a run's numbers say in a sentence, and what to try next, as commands."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.programs.outcome import Change, Outcome
from rlhf.programs.report_record import RunRecord
from rlhf.tracking.redact import printable

CLEAR = 2.0  # standard errors
_SMALL_KL_NATS = 0.5


@dataclass(frozen=True)
class Verdict:
    """tone: how the page colours it."""

    tone: Literal["good", "bad", "plain"]
    text: str


@dataclass(frozen=True)
class Advice:
    """why: one sentence. command: a line to paste, or empty."""

    why: str
    command: str = ""


def verdict(record: RunRecord, outcome: Outcome | None) -> Verdict | None:
    """One sentence about the held-out prompts; None where nothing was evaluated before and after."""
    if outcome is None or "reward" not in outcome.changes:
        return None
    reward, kl = outcome.changes["reward"], outcome.changes.get("kl")
    gold, name = outcome.changes.get(record.yardstick or ""), _yardstick(record)
    cost = f" at a cost of {kl.after:.2g} nats of KL" if kl and kl.after > 0 else ""
    base = f"on {reward.prompts} held-out prompts{cost}."
    if gold is None:
        return Verdict("good" if _up(reward) else "plain", f"Reward {_moved(reward)} {base}")
    both = f"{name} {_moved(gold)} and reward {_moved(reward)} {base}"
    peak = fell_from_peak(record)
    if _up(reward) and (_down(gold) or peak):
        where = f" {name} was best near step {peak[0]} ({peak[1]:.3g}, at the end {peak[2]:.3g})." if peak else ""
        return Verdict("bad", f"The reward model is being exploited. {both}{where}")
    return Verdict("good" if _up(gold) else "bad" if _down(gold) else "plain", both)


def fell_from_peak(record: RunRecord, blocks: int = 10) -> tuple[int, float, float] | None:
    """(step, peak, end) where the yardstick's curve ends clearly below its best tenth; None where it does not.

    Clear means by more than three standard errors of the difference and a tenth of the curve's whole rise.
    """
    steps, values = record.curve(f"reward/{record.yardstick}_mean")
    size = len(values) // blocks
    if size < 3:
        return None
    parts = [values[i * size : (i + 1) * size] for i in range(blocks - 1)] + [values[-size:]]
    means = [sum(part) / size for part in parts]
    best = max(range(blocks), key=lambda index: means[index])
    spread = sum(_variance(parts[index]) for index in (best, -1)) / size
    fall = means[best] - means[-1]
    if fall <= max(3 * math.sqrt(spread), 0.1 * (means[best] - min(means))) or fall <= 0:
        return None
    return round(steps[best * size + size // 2]), means[best], means[-1]


def advice(record: RunRecord, outcome: Outcome | None) -> list[Advice]:
    """What to try next: first what the numbers call for, then the experiments that teach most. Policy runs only."""
    if not record.has("kl/reference"):
        return []
    return [*_symptoms(record, outcome), *_experiments(record), _compare(record)]


def _symptoms(record: RunRecord, outcome: Outcome | None) -> Iterator[Advice]:
    beta = _number(record, "kl.beta") or 0.0
    changes = outcome.changes if outcome else {}
    reward, gold = changes.get("reward"), changes.get(record.yardstick or "")
    if reward and gold and _up(reward) and (_down(gold) or fell_from_peak(record)):
        tighter = 2 * beta if beta else 0.05
        why = "The reward model was exploited: hold the policy closer to the reference."
        yield Advice(why, _command(record, "tighter", {"kl.beta": f"{tighter:g}"}))
    entropy = record.curve("policy/entropy")[1]
    if len(entropy) >= 10 and entropy[0] > 0 and (record.last("policy/entropy") or 0.0) < 0.3 * entropy[0]:
        tighter = 2 * beta if beta else 0.05
        why = "Entropy fell below a third of its start: the policy says the same thing again and again."
        yield Advice(why, _command(record, "diverse", {"kl.beta": f"{tighter:g}"}))
    stopped, longest = record.last("completion/eos_rate"), _number(record, "rollout.max_new_tokens")
    if stopped is not None and stopped < 0.9 and longest:
        why = f"{100 * (1 - stopped):.0f} % of completions were cut off before they stopped by themselves."
        yield Advice(why, _command(record, "longer-text", {"rollout.max_new_tokens": f"{2 * longest:g}"}))
    steps, rate = _number(record, "run.steps"), _number(record, "optim.lr")
    kl = record.last("kl/reference")
    if kl is not None and kl < _SMALL_KL_NATS and reward and not _up(reward) and rate:
        why = f"The policy hardly moved ({kl:.2g} nats): a larger step."
        yield Advice(why, _command(record, "faster", {"optim.lr": f"{3 * rate:g}"}))
    elif gold and _up(gold) and steps and _still_rising(record):
        why = f"{_yardstick(record)} was still rising at the end: train longer."
        yield Advice(why, _command(record, "longer", {"run.steps": f"{2 * steps:g}"}))


def _experiments(record: RunRecord) -> Iterator[Advice]:
    if _number(record, "kl.beta"):
        why = "See what the KL penalty is for: without it reward ends higher and the true quality lower."
        yield Advice(why, _command(record, "no-kl", {"kl.beta": "0"}))
        if record.settings.get("kl.estimator") == "k1":
            why = "The same penalty without its variance: KL over the whole vocabulary instead of sampled tokens."
            yield Advice(why, _command(record, "exact-kl", {"kl.estimator": "exact"}))
    if record.settings.get("objective") == "reinforce" and record.settings.get("reinforce.baseline") != "none":
        why = "See the variance that a baseline saves: the same run without one."
        yield Advice(why, _command(record, "no-baseline", {"reinforce.baseline": "none"}))


def _compare(record: RunRecord) -> Advice:
    return Advice("Then lay the runs over each other.", f"rlhf report {shlex.quote(str(record.path))} runs/…")


def _command(record: RunRecord, name: str, changes: dict[str, str]) -> str:
    """The run's own command with these keys changed and a name of its own, so that it gets its own directory."""
    new = {"run.name": name, **changes}
    try:
        words = shlex.split(str(record.run.get("command", "")))
    except ValueError:
        words = []
    if words[:2] != ["rlhf", "train"] or len(words) < 3:
        words = ["rlhf", "train", "RECIPE"]
    replaced = (*new, "run.output_dir", "run.resume")
    kept = [word for word in words if word.partition("=")[0] not in replaced]
    return shlex.join([*kept, *(f"{key}={value}" for key, value in new.items())])


def _number(record: RunRecord, key: str) -> float | None:
    value: Any = record.settings.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _still_rising(record: RunRecord) -> bool:
    """Whether the last fifth of the yardstick's curve lies above the fifth before it by twice its standard error."""
    values = record.curve(f"reward/{record.yardstick}_mean")[1]
    fifth = len(values) // 5
    if fifth < 4:
        return False
    late, early = values[-fifth:], values[-2 * fifth : -fifth]
    rise = (sum(late) - sum(early)) / fifth
    return rise > CLEAR * math.sqrt((_variance(late) + _variance(early)) / fifth)


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _yardstick(record: RunRecord) -> str:
    name = printable(str(record.yardstick), newlines=False)
    return name[:1].upper() + name[1:]


def _up(change: Change) -> bool:
    return change.difference > CLEAR * change.error


def _down(change: Change) -> bool:
    return -change.difference > CLEAR * change.error


def _moved(change: Change) -> str:
    if not _up(change) and not _down(change):
        return f"did not clearly move ({change.difference:+.3g} ± {change.error:.2g})"
    return f"{'rose' if _up(change) else 'fell'} by {abs(change.difference):.3g} ± {change.error:.2g}"
