"""One step off-policy: the next step's completions are decoded while this step's are scored and trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from rlhf.rollout import Prompt, Rollout
from rlhf.sampling.engine import EngineSampler

PromptsOf = Callable[[int], tuple[Sequence[Prompt], Sequence[int]]]


@dataclass(frozen=True, kw_only=True)
class AheadSampler:
    """A Sampler that begins step t + 1 before it hands out step t.

    Step t + 1 is then decoded with the weights that step t's update starts from: completions of a policy one update
    old, the first of a start or a restart apart. Their ``old_logprobs`` are what that policy said of them, as its
    engine computed it, so that the objective weighs them against the policy of now.
    """

    sampler: EngineSampler
    prompts_of: PromptsOf
    steps: int
    begun: dict[int, Callable[[], Rollout]] = field(default_factory=dict)

    def sample(self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], step: int) -> Rollout:
        """As ``EngineSampler.sample``. prompts: those of ``prompts_of(step)``."""
        finish = self.begun.pop(step, None) or self.sampler.begin(model, prompts, slots, step)
        rollout = finish()
        if step < self.steps:
            self.begun[step + 1] = self.sampler.begin(model, *self.prompts_of(step + 1), step + 1)
        return replace(rollout, old_logprobs=rollout.rollout_logprobs)

    def greedy(self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], step: int) -> Rollout:
        """The arg-max completion of each prompt, by the weights of now; waits for what was begun."""
        return self.sampler.greedy(model, prompts, slots, step)
