"""``rlhf quickstart``: SFT, a reward model larger than the policy, then REINFORCE, on a task made by code."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rlhf.errors import ExitCode
from rlhf.programs import launch
from rlhf.programs.outcome import outcome, show
from rlhf.recipe import load_recipe

STAGES = ("sft", "reward", "reinforce")
_SHORTENED = {"sft": ["run.steps=60"], "reward": ["run.steps=40"], "reinforce": ["run.steps=8"]}
_NEXT = """what to try next
  rlhf train quickstart/reinforce run.name=no-kl kl.beta=0                        what the penalty is for
  rlhf train quickstart/reinforce run.name=no-baseline reinforce.baseline=none    the variance a baseline saves
  rlhf report runs/quickstart-reinforce runs/no-kl-reinforce                      both runs on one page"""


def main(shortened: bool, overrides: Sequence[str]) -> ExitCode:
    """Runs the three stages; a finished one is not run again. ``overrides`` go to every stage."""
    started = time.monotonic()
    run = Path()
    for stage in STAGES:
        changes = [*(_SHORTENED[stage] if shortened else ()), *overrides]
        recipe = load_recipe(f"quickstart/{stage}", changes)
        print(f"── {stage}: {recipe.output_dir}", flush=True)
        code = launch.train(recipe, ["rlhf", "train", f"quickstart/{stage}", *changes])
        if code != ExitCode.DONE:
            return code
        run = recipe.output_dir
    show(outcome(run))
    print(f"\nreport: {run / 'report.html'}   ({time.monotonic() - started:.0f} s)\n\n{_NEXT}", flush=True)
    return ExitCode.DONE
