"""One thread that owns the reward model, and the requests that wait for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from rlhf.rewards.model import RewardModel
from rlhf.rollout import Prompt

Scores = list[float | None]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What one request asks to be scored. Equal prompts are one object: they share a forward's row."""

    prompts: Sequence[Prompt]
    texts: Sequence[str]
    finished: Sequence[bool]

    def rows(self, model: RewardModel) -> list[list[int]]:
        """In the model's tokens. Raises UserError for texts that its template refuses."""
        return model.render(self.prompts, self.texts, self.finished)


@dataclass(frozen=True, kw_only=True)
class Ids:
    """The same in token ids. prompts: stand for the prompts' ids, one object for equal ones. conversational: whether a
    prompt is a rendered conversation."""

    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    conversational: Sequence[bool]
    finished: Sequence[bool]

    def rows(self, model: RewardModel) -> list[list[int]]:
        """As the model reads them. Raises UserError for an id that it does not embed."""
        return model.rows_of_ids(self.prompt_ids, self.completion_ids, self.conversational, self.finished)


Asked = Texts | Ids


@dataclass(frozen=True)
class _Job:
    """A request that waits. rows: its texts in the model's tokens, once they are rendered."""

    asked: Asked
    answer: Future[Scores]
    rows: list[list[int]] = field(default_factory=list)


class Scorer:
    """Scores requests in the order they came, in a thread of its own.

    merge: requests that wait are scored together, as many as fill ``budget_tokens``; a score then depends on who else
    asks, in its last digits. Otherwise each request has forwards of its own. waiting: how many requests may wait.
    """

    def __init__(self, model: RewardModel, *, merge: bool, budget_tokens: int, waiting: int) -> None:
        self._model, self._merge, self._budget = model, merge, budget_tokens
        self._jobs: queue.Queue[_Job | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="scorer", daemon=True)
        self._thread.start()

    def submit(self, asked: Asked) -> Future[Scores]:
        """The scores to come, None for what cannot be scored. Raises ``queue.Full`` where too many wait already.

        The future raises UserError for what the model cannot read (``rows``), and whatever scoring raised.
        """
        job = _Job(asked, Future())
        self._jobs.put_nowait(job)
        return job.answer

    def close(self) -> None:
        """Returns when everything that was submitted is answered."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._jobs.get()) is not None:
            jobs, ends = self._collect(first)
            self._answer(jobs)
            if ends:
                return

    def _collect(self, first: _Job) -> tuple[list[_Job], bool]:
        """Rendered requests that are scored together, and whether the end came up behind them."""
        jobs = self._rendered(first)
        while self._merge and sum(len(row) for job in jobs for row in job.rows) < self._budget:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                return jobs, True
            jobs += self._rendered(job)
        return jobs, False

    def _rendered(self, job: _Job) -> list[_Job]:
        """The job with its rows; nothing where it was given up or refused, which its future then says."""
        if not job.answer.set_running_or_notify_cancel():
            return []
        try:
            return [_Job(job.asked, job.answer, job.asked.rows(self._model))]
        except Exception as error:
            job.answer.set_exception(error)
            return []

    def _answer(self, jobs: list[_Job]) -> None:
        """Scores jobs in common; where that fails, each alone, so that one cannot spoil the others."""
        if not jobs:
            return
        prompts = [prompt for job in jobs for prompt in job.asked.prompts]
        try:
            found = self._model.score_rows(prompts, [row for job in jobs for row in job.rows])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
            else:
                for job in jobs:
                    self._answer([job])
            return
        scores = [score if score == score else None for score in found.tolist()]  # NaN is no JSON
        for job in jobs:
            job.answer.set_result(scores[: len(job.rows)])
            scores = scores[len(job.rows) :]
