"""Faults are injected for real: SIGKILL at every boundary, file-size limits, flipped bits, planted links."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.runtime import checkpoint as ckpt
from rlhf.runtime.manifest import FileRecord, Manifest, record_of, write_json_atomic

ROOT = Path(__file__).parents[2]


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.arange(600, dtype=torch.float32).reshape(20, 30) + step
    return {"model": {"weight": weight, "bias": weight[0].bfloat16()}, "rng": {"torch": torch.tensor([step, 1])}}


def save(root: Path, step: int, keep: int = 2, **options: object) -> Path:
    return ckpt.save_checkpoint(root, step, tensors(step), {"step": step, "x": 0.1 + 0.2}, keep=keep, **options)  # type: ignore[arg-type]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def fingerprint(directory: Path) -> dict[str, FileRecord]:
    return {path.name: record_of(path) for path in sorted(directory.iterdir())}


# --- what goes in comes out ------------------------------------------------------------------------------------------


def test_tensors_and_state_come_back_bit_for_bit(tmp_path: Path) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = {
        "model": {
            "tied": weight,
            "tied_too": weight,
            "transposed": weight.t(),
            "row": weight[1],
            "flag": torch.tensor([True, False]),
            "half": weight.bfloat16(),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(7),
            "nan": torch.tensor([float("nan"), -0.0]),
            "grad": torch.ones(2, requires_grad=True),
        },
        "nothing": {},
    }
    state = {"mean": 0.1 + 0.2, "worst": float("-inf"), "none": None, "nested": {"a": [1, 2.5]}, "text": "é\u202e\n"}
    loaded = ckpt.load_checkpoint(ckpt.save_checkpoint(tmp_path, 3, given, state, keep=1))
    assert loaded.step == 3
    assert loaded.state == state
    assert loaded.files["nothing"] == {}
    for name, expected in given["model"].items():
        found = loaded.files["model"][name]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(bits(found), bits(expected)), name


def test_large_mappings_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt, "SHARD_BYTES", 100)
    given = {"model": {str(i): torch.full((10,), float(i)) for i in range(5)} | {"large": torch.zeros(99)}}
    path = ckpt.save_checkpoint(tmp_path, 1, given, {}, keep=1)
    # 40 bytes each: two to a file, and the tensor of 396 bytes alone
    assert [name for name in names(path) if name.startswith("model")] == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    loaded = ckpt.load_checkpoint(path).files["model"]
    assert list(loaded) == list(given["model"])
    assert all(torch.equal(loaded[name], given["model"][name]) for name in loaded)


def test_loaded_weights_can_be_trained_in_place_without_touching_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    ckpt.load_checkpoint(path).files["model"]["weight"].add_(1.0)
    assert torch.equal(ckpt.load_checkpoint(path).files["model"]["weight"], tensors(1)["model"]["weight"])


def test_a_step_saved_twice_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5)
    ckpt.save_checkpoint(tmp_path, 5, tensors(6), {"second": True}, keep=2)
    assert names(tmp_path) == ["step-00000005"]
    assert ckpt.load_checkpoint(tmp_path / "step-00000005").state == {"second": True}


def test_nobody_else_can_read_a_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1)
    assert {oct(p.stat().st_mode & 0o777) for p in path.iterdir()} == {"0o600"}
    assert {oct(p.stat().st_mode & 0o777) for p in (path, path.parent)} == {"0o700"}


@pytest.mark.parametrize(
    ("files", "state", "keep"),
    [
        ({"../model": {}}, {}, 1),
        ({".model": {}}, {}, 1),
        ({"a/b": {}}, {}, 1),
        ({"": {}}, {}, 1),
        ({"model": {"w": 1.0}}, {}, 1),
        ({"model": {"w": torch.ones(1, device="meta")}}, {}, 1),
        ({"model": {"w": torch.eye(2).to_sparse()}}, {}, 1),
        ({}, {"a": {1: 2}}, 1),
        ({}, {"a": object()}, 1),
        ({}, {}, 0),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    tmp_path: Path, files: dict[str, dict[str, torch.Tensor]], state: dict[str, object], keep: int
) -> None:
    with pytest.raises((ValueError, TypeError)):
        ckpt.save_checkpoint(tmp_path, 1, files, state, keep=keep)
    assert names(tmp_path) == []


GOLDEN_MANIFEST = """{
  "format": "rlhf-checkpoint",
  "version": 1,
  "step": 7,
  "libraries": {
    "rlhf": "0.1.0"
  },
  "parts": {
    "model": [
      "model.safetensors"
    ]
  },
  "files": {
    "model.safetensors": {
      "bytes": 72,
      "sha256": "750861a29a826e00dff53bbe36d5843b72761e94f79104b2f67eea65826342c1"
    },
    "state.json": {
      "bytes": 11,
      "sha256": "23344736596883ce1a08ba1d0135b621cc0f1d92006e26ee80597136c815876f"
    }
  },
  "sha256": "737674761713161626b44d5a25676ef9c724d3a70ef3b3512c08a8f08dee21c6"
}
"""


def test_a_checkpoint_of_format_1_written_by_hand_still_loads(tmp_path: Path) -> None:
    """The format's promise: if this fails, FORMAT_VERSION must rise and the old format must still be read."""
    directory = tmp_path / "step-00000007"
    directory.mkdir()
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '
    body = np.array([1.5, -2.0], dtype="<f4").tobytes()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)
    (directory / "state.json").write_text('{"step": 7}')
    (directory / "manifest.json").write_text(GOLDEN_MANIFEST)
    loaded = ckpt.load_checkpoint(directory)
    assert loaded.state == {"step": 7}
    assert loaded.files["model"]["w"].tolist() == [1.5, -2.0]


# --- death at every boundary (F4) ------------------------------------------------------------------------------------

FAILPOINTS = ("after_model", "before_manifest", "before_rename", "after_rename", "mid_prune")
COMMITTED = ("after_rename", "mid_prune")

# One child imports torch once and forks for every death, so that each one is a real SIGKILL of a real process. It also
# lives through a file-size limit, which stands for a full disk.
CHILD = """
import json, os, resource, sys
from pathlib import Path
from rlhf.runtime.checkpoint import CheckpointFailed, newest_checkpoint, save_checkpoint
from test_checkpoint import save
import torch

def die(root, saves, keep, failpoint):
    "Saves the next steps until the failpoint strikes. Returns first step, signal, and the newest step afterwards."
    path = newest_checkpoint(Path(root)).path
    first = int(path.name[5:]) + 1 if path else 1
    if os.fork() == 0:
        os.environ["RLHF_TEST_FAILPOINT"] = f"{failpoint}@{first + saves - 1}"
        for step in range(first, first + saves):
            save(Path(root), step, keep=keep)
        os._exit(0)
    signal = os.WTERMSIG(os.wait()[1])
    path = newest_checkpoint(Path(root)).path
    return first, signal, int(path.name[5:]) if path else 0

def fail(root):
    "Two saves that are larger than a file may be. Returns the messages."
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    messages = []
    for step in (3, 4):
        try:
            save_checkpoint(Path(root), step, {"model": {"w": torch.ones(2**19)}}, {}, keep=2)
        except CheckpointFailed as error:
            messages.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return messages

jobs = json.load(sys.stdin)
print(json.dumps({"deaths": [die(*job) for job in jobs["deaths"]], "failures": fail(jobs["limited"])}))
"""


@dataclass(frozen=True)
class Faults:
    """What the child was told to do and what it reported: (first step, signal, newest step) for each death."""

    root: Path
    jobs: list[tuple[str, int, int, str]]
    deaths: list[tuple[int, int, int]]
    failures: list[str]
    before: dict[str, FileRecord]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    root = tmp_path_factory.mktemp("faults")
    generator = random.Random(0)
    at_boundaries = [(str(root / name), 4, 2, name) for name in FAILPOINTS]
    at_random = [
        (str(root / str(run)), generator.randint(1, 3), generator.randint(1, 2), generator.choice(FAILPOINTS))
        for run in range(12)
        for _ in range(4)
    ]
    for step in (1, 2):
        save(root / "limited", step)
    before = fingerprint(root / "limited" / "step-00000002")
    jobs = [*at_boundaries, *at_random]
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        input=json.dumps({"deaths": jobs, "limited": str(root / "limited")}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    deaths = [(first, killed, newest) for first, killed, newest in found["deaths"]]
    return Faults(root=root, jobs=jobs, deaths=deaths, failures=found["failures"], before=before)


def test_death_at_every_boundary_leaves_the_last_complete_checkpoint(faults: Faults) -> None:
    """Steps 1 … 4 with keep = 2, dying in the save of step 4: step 3 is whole before the rename, step 4 after it."""
    assert faults.deaths[: len(FAILPOINTS)] == [
        (1, signal.SIGKILL, 4 if name in COMMITTED else 3) for name in FAILPOINTS
    ]
    for name in FAILPOINTS:
        root = faults.root / name
        expected = 4 if name in COMMITTED else 3
        assert len(list(root.glob(".*"))) == (name != "after_rename"), "one hidden directory is left by the dead save"
        newest = ckpt.newest_checkpoint(root)
        assert newest == (ckpt.step_directory(root, expected), ())
        assert torch.equal(
            ckpt.load_checkpoint(newest[0]).files["model"]["weight"], tensors(expected)["model"]["weight"]
        )
        save(root, expected + 1, keep=2)
        assert names(root) == [f"step-{step:08d}" for step in (expected, expected + 1)]


def test_any_sequence_of_saves_and_deaths_leaves_the_step_committed_last(faults: Faults) -> None:
    """12 directories, four deaths each at random points with random keep, then picked up again."""
    at_random = list(zip(faults.jobs, faults.deaths, strict=True))[len(FAILPOINTS) :]
    assert sum(killed for _, (_, killed, _) in at_random) > 36 * signal.SIGKILL, "mid_prune needs a spare checkpoint"
    for (_, saves, _, point), (first, killed, newest) in at_random:
        committed = not killed or point in COMMITTED
        assert newest == first + saves - 1 if committed else newest == first + saves - 2


def test_a_replaced_checkpoint_comes_back_when_the_replacement_died(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    os.rename(path, tmp_path / ".replaced-step-00000003-0123abcd")
    assert ckpt.newest_checkpoint(tmp_path).path is None
    ckpt.recover(tmp_path)
    assert ckpt.newest_checkpoint(tmp_path).path == path


# --- a full disk (F8) ------------------------------------------------------------------------------------------------


def test_a_file_system_that_takes_no_more_costs_only_the_spare_checkpoint(faults: Faults) -> None:
    root = faults.root / "limited"
    assert len(faults.failures) == 2
    assert all(words in faults.failures[0] for words in ("step 3", "2.0 MiB", "step-00000002 is untouched"))
    assert names(root) == ["step-00000002"] and fingerprint(root / "step-00000002") == faults.before
    save(root, 5)
    assert names(root) == ["step-00000002", "step-00000005"]


def test_too_little_free_space_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 99, 1))
    with pytest.raises(ckpt.CheckpointFailed, match=r"1 free.*step-00000001 is untouched"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_giving_up_the_spare_checkpoint_makes_room_for_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda root: usage(9, 9, 0 if len(names(root)) == 2 else 10**9))
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_root_under_a_file_fails_clearly(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ckpt.CheckpointFailed, match="step 1"):
        save(tmp_path / "file" / "checkpoints", 1)


# --- corruption (F10, S1) --------------------------------------------------------------------------------------------


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    bit %= len(content) * 8
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def link_out(path: Path) -> None:
    twin = path.parent.parent.parent / f"outside-{path.name}"
    shutil.move(path, twin)
    path.symlink_to(twin)


def swap_with_other_step(path: Path) -> None:
    shutil.copy(path.parents[1] / "step-00000001" / path.name, path)


FAULTS: dict[str, Callable[[Path], None]] = {
    **{f"truncate {share}": lambda path, share=share: truncate(path, share) for share in (0, 0.3, 0.9, 0.999)},
    **{f"flip {i}": lambda path, i=i: flip(path, random.Random(i).randrange(10**9)) for i in range(60)},
    "delete": lambda path: path.unlink(),
    "grow": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "link": link_out,
    "directory": lambda path: (path.unlink(), path.mkdir())[0],
    "swap": swap_with_other_step,
}


@pytest.mark.parametrize("name", ["model.safetensors", "rng.safetensors", "state.json", "manifest.json"])
def test_every_damage_to_every_file_is_found_named_and_passed_over(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        save(tmp_path / "whole", step)
    for index, (fault, inflict) in enumerate(FAULTS.items()):
        root = tmp_path / str(index) / "checkpoints"
        shutil.copytree(tmp_path / "whole", root)
        damaged = root / "step-00000002"
        inflict(damaged / name)
        with pytest.raises(ckpt.CheckpointInvalid, match=name):
            ckpt.load_checkpoint(damaged)
        newest = ckpt.newest_checkpoint(root)
        assert newest.path == root / "step-00000001", fault
        assert len(newest.notes) == 1 and name in newest.notes[0] and "step-00000002" in newest.notes[0]


def edit_manifest(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    (path / "manifest.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(step=3),
        lambda data: data.update(version=2),
        lambda data: data.update(format="x"),
        lambda data: data.pop("sha256"),
        lambda data: data.pop("files"),
        lambda data: data["files"]["model.safetensors"].update(sha256="0" * 64),
        lambda data: data["files"].pop("rng.safetensors"),
        lambda data: data["parts"].clear(),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = save(tmp_path, 2)
    edit_manifest(path, change)
    with pytest.raises(ckpt.CheckpointInvalid, match=r"manifest\.json"):
        ckpt.load_checkpoint(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "7", '{"format": "rlhf-checkpoint", "version": 1}', "[" * 10**5]
)
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 2)
    (path / "manifest.json").write_text(text)
    with pytest.raises(ckpt.CheckpointInvalid, match=r"manifest\.json"):
        ckpt.load_checkpoint(path)


@pytest.mark.parametrize("name", ["../../victim", "/etc/passwd", "..", "a/b", "", "nul\0"])
def test_a_manifest_with_a_right_hash_still_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 2)
    forged = Manifest(step=2, files={name: FileRecord(bytes=1, sha256="0")}, parts={}, libraries={})
    write_json_atomic(path / "manifest.json", forged.to_json())
    with pytest.raises(ckpt.CheckpointInvalid, match="leaves its directory"):
        ckpt.load_checkpoint(path)


def test_added_files_renamed_directories_and_links_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ckpt.CheckpointInvalid, match="symbolic link"):
        ckpt.load_checkpoint(tmp_path / "link")
    shutil.copytree(path, tmp_path / "step-00000009")
    with pytest.raises(ckpt.CheckpointInvalid, match="of step 2"):
        ckpt.load_checkpoint(tmp_path / "step-00000009")
    assert ckpt.newest_checkpoint(tmp_path).path == path
    (path / "extra.bin").touch()
    with pytest.raises(ckpt.CheckpointInvalid, match=r"extra\.bin: not listed"):
        ckpt.load_checkpoint(path)


class Exploit:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


def test_no_file_of_a_checkpoint_is_ever_unpickled(tmp_path: Path) -> None:
    """Each file replaced by an exploit, also with a manifest that lists the exploit's own hash."""
    marker = tmp_path / "executed"
    for name in ("model.safetensors", "state.json", "manifest.json"):
        for forged in (False, True):
            path = save(tmp_path / f"{name}-{forged}", 1)
            torch.save(Exploit(marker), path / name)
            if forged and name != "manifest.json":
                listed = {item.name: record_of(item) for item in path.iterdir() if item.name != "manifest.json"}
                parts = {"model": ("model.safetensors",), "rng": ("rng.safetensors",)}
                write_json_atomic(
                    path / "manifest.json", Manifest(step=1, files=listed, parts=parts, libraries={}).to_json()
                )
            with pytest.raises(ckpt.CheckpointInvalid, match=name):
                ckpt.load_checkpoint(path)
    assert not marker.exists()
    torch.load(tmp_path / "manifest.json-True/step-00000001/manifest.json", weights_only=False)
    assert marker.exists(), "the exploit itself works"


# --- listing, pruning, links (F23, S9) -------------------------------------------------------------------------------


def test_a_thousand_odd_names_raise_nothing_and_hide_nothing(tmp_path: Path) -> None:
    save(tmp_path, 12)
    generator = random.Random(1)
    targets = [tmp_path, Path("/etc"), tmp_path / "nowhere", tmp_path / "step-00000012"]
    stems = [
        "step-",
        "step_",
        "step_-1",
        "step-1e3",
        "step-00000099",
        "step-" + "\uff19" * 8,
        "STEP-00000099",
        "latest",
        "",
    ]
    for index in range(1000):
        stem = generator.choice(stems)
        tail = "".join(generator.choice("0123456789-_.e\n é\u202e") for _ in range(generator.randint(0, 9)))
        path = tmp_path / (stem + tail if (stem + tail).strip(".") else f"x{index}")
        if os.path.lexists(path):
            continue
        kind = generator.randrange(4)
        if kind == 0:
            path.touch()
        elif kind == 1:
            path.mkdir()
        else:
            path.symlink_to(generator.choice(targets))
    (tmp_path / ("step-" + "\uff18" * 8)).mkdir()  # digits to Python, not to us
    assert set(ckpt.checkpoint_steps(tmp_path)) <= {12, 99}
    assert ckpt.newest_checkpoint(tmp_path).path == tmp_path / "step-00000012"
    count = len(names(tmp_path))
    save(tmp_path, 13, keep=1)
    assert ckpt.newest_checkpoint(tmp_path).path == tmp_path / "step-00000013"
    assert len(names(tmp_path)) == count, "12 went, 13 came, nothing else was touched"


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.touch(), lambda p: p.symlink_to(p)])
def test_no_checkpoint_is_no_error(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "root")
    assert ckpt.newest_checkpoint(tmp_path / "root") == (None, ())


def test_pruning_keeps_the_newest_the_protected_and_what_is_not_ours(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    root = tmp_path / "checkpoints"
    save(root, 99)  # a higher step: of another branch of the run
    for step in (1, 2):
        save(root, step, keep=9)
    (root / "step-00000003").symlink_to(victim)
    (root / "step-00000004").mkdir()  # no manifest: not made by us
    (root / "step-00000004" / "notes.txt").touch()
    (root / ".staging-step-00000005-0123abcd").symlink_to(victim)
    (root / ".staging-mine").mkdir()
    for step in (5, 6, 7):
        save(root, step, protect={1})
    assert names(root) == [
        ".staging-mine",
        ".staging-step-00000005-0123abcd",
        "step-00000001",
        "step-00000003",
        "step-00000004",
        "step-00000006",
        "step-00000007",
        "step-00000099",
    ]
    assert names(victim) == ["precious"]


def test_a_directory_that_is_not_ours_does_not_count_among_those_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-00000003").mkdir()
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_a_link_or_a_strangers_directory_in_the_place_of_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    victim, root = tmp_path / "victim", tmp_path / "checkpoints"
    victim.mkdir()
    (victim / "precious").touch()
    root.mkdir()
    (root / "step-00000001").symlink_to(victim)
    assert ckpt.load_checkpoint(save(root, 1)).step == 1
    assert names(victim) == ["precious"]
    (root / "step-00000002").mkdir()
    (root / "step-00000002" / "precious").touch()
    with pytest.raises(ckpt.CheckpointFailed, match="not written by this program"):
        save(root, 2)
    assert names(root / "step-00000002") == ["precious"]


# --- small things ----------------------------------------------------------------------------------------------------


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(), np.random.rand(), np.random.randn(), float(torch.rand(()))

    draw()  # leaves a second gaussian pending in python and numpy
    path = ckpt.save_checkpoint(tmp_path, 1, {"rng": ckpt.rng_tensors()}, {}, keep=1)
    expected = draw()
    saved = ckpt.load_checkpoint(path).files["rng"]
    ckpt.restore_rng(saved)
    assert draw() == expected
    for broken in ({}, {**saved, "numpy": saved["python"]}, {**saved, "torch": saved["torch"][:9]}):
        untouched = draw_after(saved)
        ckpt.restore_rng(saved)
        with pytest.raises(ckpt.CheckpointInvalid, match="rng"):
            ckpt.restore_rng(broken)
        assert draw() == untouched


def draw_after(saved: dict[str, torch.Tensor]) -> tuple[float, ...]:
    ckpt.restore_rng(saved)
    return random.random(), random.gauss(), np.random.rand(), np.random.randn(), float(torch.rand(()))


def test_write_json_atomic_keeps_the_old_content_when_the_new_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["run.json"]
