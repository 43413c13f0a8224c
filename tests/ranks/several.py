"""Run by every rank: whole runs one after the other in one launch, so that imports are paid for once."""

from __future__ import annotations

import json
import sys

import rlhf
from rlhf.errors import ExitCode
from rlhf.programs import launch


def main(runs: list[list[str]]) -> int:
    """runs: the overrides of each, on ``recipe.yaml``. Returns the exit code of the first that failed, else 0."""
    launch.distributed.leave = lambda runtime: None  # type: ignore[assignment]  # the group stays for the next run
    for overrides in runs:
        code = rlhf.train("recipe.yaml", *overrides)
        if code != ExitCode.DONE:
            print(f"failed: {overrides}", file=sys.stderr, flush=True)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
