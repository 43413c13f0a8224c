"""Stops a run that has diverged. A skipped step is counted and shown, never silent."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.errors import ExitCode, UserError

PATIENCE = 5


@dataclass
class Guard:
    """Ends the run after ``PATIENCE`` skipped steps in a row (non-finite gradients); weights stay as they were."""

    in_a_row: int = 0
    skipped: int = 0

    def check(self, step: int, *, applied: bool) -> None:
        """Raises UserError with exit code 70."""
        if applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row >= PATIENCE:
            raise UserError(
                f"step {step}: the gradient was not finite {PATIENCE} steps in a row; the last checkpoint is finite. "
                "Lower optim.lr, raise kl.beta or look at the rewards in samples.jsonl",
                ExitCode.DIVERGED,
            )
