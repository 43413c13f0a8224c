"""A run whose reward comes from a server that dies: with it back, the weights are those of a run that saw nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch

import rlhf
from rlhf.errors import ExitCode, UserError
from rlhf.programs.reward_queue import Scores, Texts
from rlhf.recipe import load_recipe
from rlhf.rewards.model import load_reward_model
from tests.end_to_end.runs import Run, train
from tests.rewards.serving import running

AT_EACH_STEP: list[Callable[[int], None]] = []  # what a test does while a run scores, by the step's number
WATCH = 'reward.functions=[{call: "tests.end_to_end.test_reward_server:watch", weight: 0}]'
STEPS = "run.steps=4"


def watch(completions: list[Any], trainer_state: Any, **columns: Any) -> list[float]:
    """A reward function of weight 0, called after the reward model has scored."""
    for act in AT_EACH_STEP:
        act(trainer_state.global_step)
    return [0.0] * len(completions)


@pytest.fixture(autouse=True)
def nobody_watches() -> Iterator[None]:
    yield
    AT_EACH_STEP.clear()


@pytest.fixture
def judge(recipe: str, tmp_path: Path) -> str:
    """``final/`` of a reward model of one step."""
    pairs = "data.train.0.path=rlhf.data.quickstart:preferences"
    assert rlhf.train(recipe, "objective=reward", pairs, "run.name=judge", "run.steps=1") == ExitCode.DONE
    return str(tmp_path / "runs" / "judge-reward" / "final")


def by_url(url: str, **settings: object) -> str:
    entry = {"url": url, **settings}
    return f"reward.models=[{json.dumps(entry)}]"


def same(one: Run, two: Run) -> bool:
    return all(torch.equal(value, two.weights[name]) for name, value in one.weights.items())


def start(life: ExitStack, model: str, folder: Path, port: int = 0) -> subprocess.Popen[str]:
    """``rlhf serve-reward`` as a process, which takes its port before it loads and is killed when ``life`` ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RM_TOKEN": "a-token-of-mine"}
    command = ["serve-reward", model, "--port", str(port), "--token-env", "RM_TOKEN"]
    with (folder / "server.log").open("a") as log:
        process = life.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "rlhf", *command], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        )
    life.callback(process.kill)
    return process


def test_a_server_killed_in_the_middle_changes_nothing(
    recipe: str, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 while a step is being scored, and a new process at the same port: its requests are asked again."""
    monkeypatch.setenv("RM_TOKEN", "a-token-of-mine")
    with ExitStack() as life:
        servers = [start(life, judge, tmp_path)]
        assert servers[0].stdout is not None
        url = servers[0].stdout.readline().split()[-1]
        source = by_url(url, token_env="RM_TOKEN", give_up_seconds=120)
        whole = train(recipe, source, WATCH, STEPS, name="whole")

        def strike(step: int) -> None:
            if step == 2:
                servers[0].kill()
                servers[0].wait()
                servers.append(start(life, judge, tmp_path, int(url.rpartition(":")[2])))

        AT_EACH_STEP.append(strike)
        broken = train(recipe, source, WATCH, STEPS, name="broken")
    assert len(servers) == 2 and same(whole, broken)
    assert "reward/judge-reward_mean" in broken.metrics[0]
    for file in broken.path.rglob("*"):
        assert file.suffix == ".safetensors" or file.is_dir() or "a-token-of-mine" not in file.read_text()


def test_a_server_that_is_gone_costs_no_step(
    recipe: str, judge: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 75 with the last whole step saved. With the server back the run ends at the weights of one that had it
    all along; a model that is read here scores alike, up to what the rows of other prompts beside it round off."""
    model = load_reward_model(judge, device="cpu", microbatch_tokens=512)
    settings = (WATCH, STEPS, "checkpoint.every_steps=null")
    local = train(recipe, f"reward.models=[{{path: {judge}}}]", *settings, name="local")
    with running(model) as server:
        whole = train(recipe, by_url(server.url), *settings, name="whole")
    assert whole.metrics[0]["reward/score_mean"] == pytest.approx(local.metrics[0]["reward/score_mean"], abs=1e-5)
    assert whole.metrics[0]["time/score_hidden_seconds"] >= 0 and "time/score_hidden_seconds" not in local.metrics[0]
    with ExitStack() as life:
        server = life.enter_context(running(model))
        source, requests, submit = (
            by_url(server.url, give_up_seconds=0.5),
            Queue[Future[Scores]](),
            server.scorer.submit,
        )

        def counted(asked: Texts) -> Future[Scores]:
            answer = submit(asked)
            requests.put(answer)
            return answer

        def strike(step: int) -> None:
            if step == 3:
                for _ in range(3 * 4):  # one a prompt: what this step needs is there
                    requests.get(timeout=60).result()
                life.close()

        monkeypatch.setattr(server.scorer, "submit", counted)
        AT_EACH_STEP.append(strike)
        assert rlhf.train(recipe, source, *settings, "run.name=gone") == ExitCode.REWARD_GONE
    gone = Run(Path("runs") / "gone-reinforce")
    assert (gone.record["exit_code"], gone.record["status"]) == (75, "failed")
    assert f"no reward from {server.url} for 0.5 seconds" in gone.record["exit_reason"]
    assert [folder.name for folder in (gone.path / "checkpoints").iterdir()] == ["step-00000003"]
    assert "trying on for up to 0.5 seconds" in capsys.readouterr().out
    AT_EACH_STEP.clear()
    with running(model) as elsewhere:  # another port: what a server holds is what counts
        assert rlhf.train(recipe, by_url(elsewhere.url), *settings, "run.name=gone") == ExitCode.DONE
    assert same(gone, whole)


def test_a_resumed_run_wants_the_model_it_started_with(recipe: str, judge: str, sft: Path) -> None:
    model = load_reward_model(judge, device="cpu")
    settings = ("run.name=pinned", "run.max_seconds=0.001")
    with running(model) as server:
        assert rlhf.train(recipe, by_url(server.url), *settings) == ExitCode.PREEMPTED
    with torch.no_grad():
        model.model.score.weight.mul_(2)  # type: ignore[union-attr, operator]
    with running(model) as server:
        assert rlhf.train(recipe, by_url(server.url), *settings) == ExitCode.USER
    reason = Run(Path("runs") / "pinned-reinforce").record["exit_reason"]
    assert reason.startswith("reward.models.0.url changed since")


def test_a_server_that_was_never_there_is_said_before_a_model_loads(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.assemble.build", lambda *_: pytest.fail("a model was about to load"))
    code = rlhf.train(recipe, by_url("http://127.0.0.1:9", give_up_seconds=0.1), "run.name=never")
    assert code == ExitCode.REWARD_GONE


def test_a_run_that_sends_its_ids(recipe: str, judge: str) -> None:
    """A random policy draws tokens that its texts would not become again; its ids are read as they were drawn."""
    asked: list[list[list[int]]] = []
    model = load_reward_model(judge, device="cpu", microbatch_tokens=512)
    forward = model.rows_of_ids

    def watched(*given: Any) -> list[list[int]]:
        asked.append(rows := forward(*given))
        return rows

    object.__setattr__(model, "rows_of_ids", watched)
    with running(model) as server:
        by_ids = train(recipe, by_url(server.url, send="ids"), STEPS, name="ids")
        sent = len(asked)
        train(recipe, by_url(server.url), STEPS, name="text")
    assert sent > 0 and len(asked) == sent  # texts are the default
    rows = [row for rows in asked for row in rows]
    assert len(rows) == 4 * 4 * 2  # steps, prompts, completions
    assert all(row[0] == model.tokenizer.bos_token_id != row[1] for row in rows)  # one, and a policy may draw more
    assert "reward/judge-reward_mean" in by_ids.metrics[0]


def test_ids_for_another_vocabulary_are_refused_before_a_model_loads(
    recipe: str, judge: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.programs.check import describe_data
    from tests.rewards.serving import tiny

    monkeypatch.setattr("rlhf.assemble.build", lambda *_: pytest.fail("a model was about to load"))
    with running(tiny()) as server:
        source = by_url(server.url, send="ids")
        assert rlhf.train(recipe, source, "run.name=other") == ExitCode.USER
        describe_data(load_recipe(recipe, [source]))
    reason = Run(Path("runs") / "other-reinforce").record["exit_reason"]
    assert reason.startswith("reward.models.0.send=ids: judge has another vocabulary than the policy")
    assert f"a run would be refused: {reason}" in capsys.readouterr().out


def test_held_out_completions_can_be_judged_by_a_server(recipe: str, judge: str) -> None:
    rows = ("data.eval.0.path=rlhf.data.quickstart:heldout_prompts", "data.eval.0.max_rows=4")
    with running(load_reward_model(judge, device="cpu")) as server:
        run = train(recipe, f'eval.models=[{{url: "{server.url}"}}]', *rows, "run.steps=1", name="judged")
    rows_written = (run.path / "metrics.jsonl").read_text().splitlines()
    assert any("eval/judge-reward_mean" in json.loads(row) for row in rows_written)


def test_check_says_what_the_server_holds(recipe: str, judge: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rlhf.programs.check import describe_data

    with running(load_reward_model(judge, device="cpu")) as server:
        describe_data(load_recipe(recipe, [by_url(server.url)]))
        assert f"server     reward.models.0.url: {server.url} holds judge-reward (float32" in capsys.readouterr().out
    describe_data(load_recipe(recipe, [by_url(server.url)]))  # a remark, no error
    assert "not asked what it holds" in capsys.readouterr().out


def test_the_token_has_to_be_there(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RM_TOKEN", raising=False)
    with pytest.raises(UserError, match="token_env: the environment variable RM_TOKEN is not set"):
        load_recipe(recipe, [by_url("http://127.0.0.1:9", token_env="RM_TOKEN")])
