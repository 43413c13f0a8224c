from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.errors import ExitCode, UserError
from rlhf.tracking.records import MetricsLog, SamplesLog, read_rows


def lines(path: Path) -> list[str]:
    return path.read_text("ascii").splitlines()


def test_each_step_is_one_line_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, {"policy/loss": 0.1, "optim/lr": 1e-6, "count": 3})
    assert lines(log.path) == ['{"step": 1, "policy/loss": 0.1, "optim/lr": 1e-06, "count": 3}']
    log.log(2, {"a": torch.tensor(0.5), "b": np.float64(0.1), "c": np.int64(7), "d": torch.tensor(True)})  # type: ignore[dict-item]
    assert json.loads(lines(log.path)[1]) == {"step": 2, "a": 0.5, "b": 0.1, "c": 7, "d": True}
    log.close()


def test_what_json_lacks_becomes_null_with_a_note(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, {"a": float("nan"), "b": float("-inf"), "c": 1.0, "d": torch.tensor(float("inf"))})  # type: ignore[dict-item]
    log.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(lines(log.path)[0], parse_constant=refuse) == {
        "step": 1,
        "a": None,
        "b": None,
        "c": 1.0,
        "d": None,
        "_non_finite": {"a": "nan", "b": "-inf", "d": "inf"},
    }


def test_samples_keep_any_text_and_show_none_of_it_raw(tmp_path: Path) -> None:
    nasty = "\x1b[31m\r\u202eé\ud800\x7f\x9b\n"
    log = SamplesLog(tmp_path)
    log.samples(3, [{"prompt": nasty, "completion": "", "scores": {"gold": float("nan")}, "step": 99}])
    log.close()
    content = log.path.read_bytes()
    assert all(byte == 10 or 32 <= byte < 127 for byte in content) and content.count(b"\n") == 1
    (row,), broken = read_rows(log.path)
    assert broken == 0 and row["prompt"] == nasty and row["step"] == 3
    assert row["scores"] == {"gold": None} and row["_non_finite"] == {"scores.gold": "nan"}


def test_a_new_row_is_not_glued_to_half_of_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "po')
    log = MetricsLog(tmp_path)
    log.log(3, {})
    log.close()
    rows, broken = read_rows(path)
    assert [row["step"] for row in rows] == [1, 3] and broken == 1


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == ([], 0)


def test_a_full_disk_ends_the_run_with_its_own_code(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written.*disk") as caught:
            for step in range(20):
                log.log(step, {"policy/loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.close()
    assert caught.value.code == ExitCode.DISK
