from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ExitCode, UserError
from rlhf.programs import report
from rlhf.programs.outcome import Change, Outcome
from rlhf.programs.report_advice import advice, fell_from_peak, verdict
from rlhf.programs.report_record import flatten, read_run

RECIPE = """objective: reinforce
run: {name: a, steps: 40}
policy: {path: some/model}
kl: {beta: 0.1, estimator: k1}
reinforce: {baseline: leave_one_out}
rollout: {max_new_tokens: 32}
optim: {lr: 1.0e-4}
"""
RUN = {
    "status": "finished",
    "command": "rlhf train my.yaml run.name=a",
    "started": "2026-01-01T00:00:00+00:00",
    "ended": "2026-01-01T01:02:03+00:00",
    "versions": {"torch": "2.13"},
    "resumes": [],
}


def metrics(steps: int = 40, **extra: float) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "reward/score_mean": step / 10,
            "reward/gold_mean": step / 20,
            "kl/reference": step / 8,
            "completion/length_mean": 20.0,
            "completion/eos_rate": 1.0,
            "policy/entropy": 2.0,
            "policy/loss": 0.5,
            **extra,
        }
        for step in range(1, steps + 1)
    ]


def samples(count: int = 3) -> list[dict[str, Any]]:
    """Reward rises by 1, 2, 3, …, gold by half of it."""
    rows = []
    for phase, step in (("before", 0), ("after", 40)):
        for slot in range(count):
            gain = (slot + 1) * (phase == "after")
            scores = {"gold": gain / 2}
            text = {"prompt": f"prompt {slot}", "completion": f"{phase} {slot}", "finished": slot != 1}
            rows.append(
                {"step": step, "phase": phase, "reward": 1.0 + gain, "kl": 0.5 * gain, "scores": scores, **text}
            )
    return rows


def make_run(
    path: Path,
    *,
    recipe: str = RECIPE,
    run: Mapping[str, Any] = RUN,
    rows: Sequence[Mapping[str, Any]] | None = None,
    texts: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(recipe)
    (path / "run.json").write_text(json.dumps(run))
    write_rows(path / "metrics.jsonl", metrics() if rows is None else rows)
    write_rows(path / "samples.jsonl", samples() if texts is None else texts)
    return path


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """The page as a browser would cut it up: tags with attributes, and the text outside of style and pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.texts: list[str] = []
        self._inside: list[str] = []
        self.raw = path.read_text("utf-8")
        self.feed(self.raw)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))
        if tag in ("style", "svg"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside and data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


# --- what a report says ----------------------------------------------------------------------------------------------


def test_a_report_shows_changes_pictures_samples_settings_and_what_next(tmp_path: Path) -> None:
    path = report.write_report(make_run(tmp_path / "a"))
    assert path == tmp_path / "a" / "report.html"
    page = Page(path)
    # differences 1, 2, 3: mean 2, standard deviation 1, standard error 1/√3 = .577; gold is half of it
    assert "reward 1.00 → 3.00 +2.00 ± 0.577" in page.text
    assert "gold 0.000 → 1.00 +1.00 ± 0.289" in page.text
    assert (
        "Gold rose by 1 ± 0.29 and reward rose by 2 ± 0.58 on 3 held-out prompts at a cost of 1 nats of KL."
        in page.text
    )
    for title in ("Reward", "Gold", "KL to the reference", "Length", "Entropy", "Gold against KL"):
        assert title in page.texts
    assert [tag for tag, _ in page.tags].count("svg") == 6
    assert "prompt 1 before cut off before 1" in page.text and "after 2" in page.text
    assert "rlhf train my.yaml run.name=no-kl kl.beta=0" in page.texts
    assert "1 h 2 min" in page.texts and "KL coefficient β 0.1" in page.text
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "metrics.jsonl",
        "recipe.yaml",
        "report.html",
        "run.json",
        "samples.jsonl",
    ]


def test_a_report_is_one_file_that_asks_for_nothing_and_always_the_same(tmp_path: Path) -> None:
    path = report.write_report(make_run(tmp_path / "a"))
    page = Page(path)
    first = path.read_bytes()
    assert report.write_report(tmp_path / "a").read_bytes() == first
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert ("meta", (("http-equiv", "Content-Security-Policy"), ("content", policy))) in page.tags
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "form", "a"}
    attributes = [pair for _, pairs in page.tags for pair in pairs]
    assert not [url for name, url in attributes if "://" in (url or "") and not name.startswith("xmlns")]
    assert "@import" not in page.raw and "url(http" not in page.raw
    links = [value for name, value in attributes if name.endswith("href")]
    ids = [value for name, value in attributes if name == "id"]
    assert links and all(str(link).startswith("#") and str(link)[1:] in ids for link in links)
    assert len(ids) == len(set(ids)), "pictures do not share ids"
    assert len(first) < 200_000


def test_no_hint_of_an_account_or_key_reaches_the_page(tmp_path: Path) -> None:
    recipe = RECIPE + "tracking:\n  api_key: canary-one\n  url: https://me:canary-two@host/x\n"
    run = {**RUN, "command": "rlhf train r.yaml reward.token=canary-three", "exit_reason": "Bearer canary-four"}
    text = report.write_report(make_run(tmp_path / "a", recipe=recipe, run={**run, "status": "failed"})).read_text()
    assert "canary" not in text and "[redacted]" in text


def test_several_runs_lie_over_each_other_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", recipe=RECIPE.replace("beta: 0.1", "beta: 0"))]
    assert report.main(runs) == ExitCode.DONE
    path = tmp_path / "comparison.html"
    assert capsys.readouterr().out == f"report: {path}\n"
    page = Page(path)
    assert "Settings that differ a b kl.beta 0.1 0" in page.text
    assert "prompt 0 before before 0 reward 1.00 gold 0.000 KL 0.000 a after 0" in page.text
    colors = set(re.findall(r"stroke: var\((--series-\d)\)", page.raw))
    assert colors == {"--series-0", "--series-1"}


def test_runs_of_different_kinds_and_none_at_all(tmp_path: Path) -> None:
    sft = make_run(tmp_path / "sft", rows=[{"step": s, "loss/sft": 5 - s / 10} for s in range(1, 41)], texts=[])
    page = Page(report.write_report(sft))
    assert "Loss" in page.texts and "What to try next" not in page.text
    assert "Start and end Means over the first and the last tenth of the curve. loss 4.75 → 1.15" in page.text
    bare = make_run(tmp_path / "bare", rows=[], texts=[], run={}, recipe="objective: sft\n")
    assert "unknown" in Page(report.write_report(bare)).texts
    both = Page(report.write_comparison([sft, make_run(tmp_path / "a"), bare], tmp_path / "all.html"))
    assert "3 runs" in both.text
    (tmp_path / "empty").mkdir()
    for place in ("empty", "missing"):
        with pytest.raises(UserError, match="holds no run"):
            report.main([tmp_path / place])
    with pytest.raises(UserError, match="two or more"):
        report.write_comparison([sft])


def test_a_killed_run_has_a_report_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", run={"status": "running"}, texts=samples()[:4])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'\n[]\n{"step": "x"}\n\xff\xfe\n{"step": 41, "rew')
    page = Page(report.write_report(run))
    assert "running" in page.texts and "8 broken lines were passed over" in page.text


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "hello"}], "completion": None, "scores": None, "kl": None},
        {"prompt": 7, "completion": ["x"], "scores": {"gold": "high"}, "reward": "good", "kl": True},
        {"completion": "x" * 10**6},
        {},
    ],
)
def test_rows_of_odd_shape_are_shown_as_far_as_they_go(tmp_path: Path, row: dict[str, Any]) -> None:
    rows = [{"step": 0, "phase": "before", **row}, {"step": 1, "phase": "after", **row}, {"step": 1, **row}]
    path = report.write_report(make_run(tmp_path / "a", rows=[], texts=rows))
    assert path.stat().st_size < 60_000


def test_a_long_run_makes_no_long_page(tmp_path: Path) -> None:
    path = report.write_report(make_run(tmp_path / "a", rows=metrics(2000)))
    assert path.stat().st_size < 300_000


def test_an_alias_bomb_in_a_recipe_is_not_unfolded(tmp_path: Path) -> None:
    bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    cycle = "objective: reinforce\nx: &x [*x]\n"
    for index, recipe in enumerate((bomb, cycle, "[" * 5000, "a: !!python/object/apply:os.getcwd []")):
        run = make_run(tmp_path / str(index), recipe=recipe, rows=[], texts=[])
        assert len(read_run(run).settings) <= 2000


def test_flatten_names_leaves_like_overrides() -> None:
    assert dict(flatten({"a": {"b": [1, {"c": None}]}, "d": {}})) == {"a.b.0": 1, "a.b.1.c": None, "d": None}


# --- what a page must not do (S7) ------------------------------------------------------------------------------------

PAYLOADS = (
    "<script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "<svg/onload=alert(1)>",
    "<a href=javascript:alert(1)>x</a>",
    "<a href='java&#x0A;script:alert(1)'>x</a>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<body onload=alert(1)>",
    "<math><mtext></mtext><mglyph><style><img src=x onerror=alert(1)></style></mglyph></math>",
    "<!--><script>alert(1)</script-->",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<details open ontoggle=alert(1)>",
    "<input autofocus onfocus=alert(1)>",
    "<meta http-equiv=refresh content='0;url=javascript:alert(1)'>",
    "<base href=//evil.example/>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<object data=javascript:alert(1)>",
    "<embed src=javascript:alert(1)>",
    "<form action=javascript:alert(1)><button>x</button></form>",
    "<style>*{background:url(//evil.example)}</style>",
    "<div style='background:url(javascript:alert(1))'>",
    "{{ 7 * 7 }}{% import os %}",
    "{{ config.__class__.__init__.__globals__ }}",
    "${alert(1)}",
    "$\\frac{$",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;",
    "\u2028<script>alert(1)</script>\u2029",
    "\x00<scr\x00ipt>alert(1)</scr\x00ipt>",
    "<script\x0b>alert(1)</script>",
    "\u202e<script>alert(1)</script>",
    "<\ud800script>alert(1)</script>",
    "\uff1cscript\uff1ealert(1)\uff1c/script\uff1e",
    "</pre></div></main><script>alert(1)</script>",
    "<template><script>alert(1)</script></template>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "x" * 300 + "<marquee onstart=alert(1)>",
)


def hostile(path: Path, payload: Sequence[str]) -> Path:
    """A run with one of the strings at each place a stranger or a model can write to."""
    text = [payload[i % len(payload)] for i in range(60)]
    rows = []
    for phase in ("before", "after"):
        for slot in range(12):
            words = {"prompt": text[slot], "completion": text[12 + slot], "scores": {"gold": 1.0, text[24 + slot]: 2.0}}
            rows.append({"step": 1, "phase": phase, "slot": slot, "reward": 1.0, "kl": 0.1, **words})
    rows += [{"step": 1, "prompt": text[36 + i], "completion": text[i], "scores": {text[i]: 1.0}} for i in range(8)]
    run = {"command": text[1], "exit_reason": text[2], "status": "failed", "commit": text[3], "started": text[4]}
    run |= {"versions": {text[5]: text[6]}}
    recipe = {
        "objective": text[7],
        "policy": {"path": text[8]},
        "kl": {"beta": text[9]},
        text[10]: text[11] + path.name,
    }
    measured = [{**row, f"reward/{text[0]}_mean": 1.0} for row in metrics()]
    return make_run(path, recipe=json.dumps(recipe), run=run, rows=measured, texts=rows)


def test_forty_payloads_leave_the_page_as_ordinary_words_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags and attributes are exactly those of the same run with harmless words, so no data became markup."""
    assert len(PAYLOADS) == 40
    words = [f"word{index}" for index in range(len(PAYLOADS))]
    names = ("<img src=x onerror=alert(1)>", "'\"><svg onload=alert(1)> {{ 7 * 7 }} $\\frac{", "plain one", "plain two")
    bad = [hostile(tmp_path / name, PAYLOADS) for name in names[:2]]
    good = [hostile(tmp_path / name, words) for name in names[2:]]
    single = report.write_report(bad[0]), report.write_report(good[0])
    monkeypatch.setattr(report, "_pictures", lambda records: [])  # they were in the pages above, and take a second each
    for attack, harmless in (
        single,
        (report.write_comparison(bad, tmp_path / "bad.html"), report.write_comparison(good, tmp_path / "good.html")),
    ):
        found, expected = Page(attack), Page(harmless)
        assert found.tags == expected.tags
        assert not any(name.startswith("on") for _, attributes in found.tags for name, _ in attributes)
        assert "<script" not in found.raw.lower()
        assert all(ord(c) >= 32 or c == "\n" for c in found.raw) and "\u202e" not in found.raw
    shown = Page(tmp_path / names[0] / "report.html").text
    assert names[1] in Page(tmp_path / "bad.html").text, "no template is evaluated"
    assert names[0] in shown and PAYLOADS[0] in shown and r"\x00<scr\x00ipt>" in shown and r"\ud800" in shown


# --- verdict and advice ----------------------------------------------------------------------------------------------


def change(difference: float, error: float = 0.1) -> Change:
    return Change(before=0.0, after=difference, error=error, prompts=256)


def outcome(**changes: float) -> Outcome:
    return Outcome(changes={name: change(value) for name, value in changes.items()}, pairs=[])


def words(path: Path, found: Outcome, **options: Any) -> tuple[str, str, dict[str, str]]:
    """Tone and text of the verdict, and advice as {last words of the command: why}."""
    record = read_run(make_run(path, **options))
    said = verdict(record, found)
    assert said is not None
    proposed = {item.command.removeprefix("rlhf train my.yaml "): item.why for item in advice(record, found)}
    return said.tone, said.text, proposed


def test_a_healthy_run_is_told_the_experiments(tmp_path: Path) -> None:
    tone, text, next_ = words(tmp_path / "a", outcome(reward=2.0, gold=1.0, kl=3.0), rows=metrics(10))
    assert tone == "good" and "at a cost of 3 nats" in text
    assert list(next_)[:3] == [
        "run.name=no-kl kl.beta=0",
        "run.name=exact-kl kl.estimator=exact",
        "run.name=no-baseline reinforce.baseline=none",
    ]
    assert list(next_)[3].startswith("rlhf report ") and len(next_) == 4


def test_exploited_stuck_cut_off_and_unfinished_runs_are_recognised(tmp_path: Path) -> None:
    tone, text, next_ = words(tmp_path / "a", outcome(reward=2.0, gold=-1.0))
    assert tone == "bad" and "exploited" in text and "run.name=tighter kl.beta=0.2" in next_
    no_kl = RECIPE.replace("beta: 0.1", "beta: 0")
    _, _, next_ = words(tmp_path / "b", outcome(reward=2.0, gold=-1.0), recipe=no_kl)
    assert "run.name=tighter kl.beta=0.05" in next_ and not any("no-kl" in command for command in next_)
    rows = [{**row, "kl/reference": 0.01} for row in metrics()]
    tone, text, next_ = words(tmp_path / "c", outcome(reward=0.1, gold=0.0), rows=rows)
    assert tone == "plain" and "did not clearly move" in text and "run.name=faster optim.lr=0.0003" in next_
    rows = metrics(**{"completion/eos_rate": 0.5})
    _, _, next_ = words(tmp_path / "d", outcome(reward=1.0, gold=1.0), rows=rows)
    assert "run.name=longer-text rollout.max_new_tokens=64" in next_ and "run.name=longer run.steps=80" in next_
    rows = [{**row, "policy/entropy": 2.0 if row["step"] < 5 else 0.1} for row in metrics()]
    assert "run.name=diverse kl.beta=0.2" in words(tmp_path / "e", outcome(reward=1.0), rows=rows)[2]


def test_gold_that_fell_from_its_peak_is_seen(tmp_path: Path) -> None:
    """Gold 0 … 20, then back to 10: best in the sixth tenth."""
    rows = [{**row, "reward/gold_mean": min(row["step"], 40 - row["step"] / 1.0)} for row in metrics(40)]
    rows = [{**row, "reward/gold_mean": row["reward/gold_mean"] + 0.01 * (row["step"] % 2)} for row in rows]
    record = read_run(make_run(tmp_path / "a", rows=rows))
    peak = fell_from_peak(record)
    assert peak is not None and 17 <= peak[0] <= 23 and peak[1] > 17 and peak[2] < 3
    assert fell_from_peak(read_run(make_run(tmp_path / "b"))) is None
    tone, text, _ = words(tmp_path / "c", outcome(reward=2.0, gold=1.0), rows=rows)
    assert tone == "bad" and "Gold was best near step" in text


def test_the_yardstick_is_gold_or_a_function_of_no_weight(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path / "a")).yardstick == "gold"
    functions = "reward: {functions: [{call: 'm:trained', weight: 1.0}, {call: 'm.n:judge', weight: 0}]}\n"
    rows = [{"step": 1, "reward/score_mean": 1.0, "reward/trained_mean": 1.0, "reward/judge_mean": 1.0}]
    assert read_run(make_run(tmp_path / "b", recipe=RECIPE + functions, rows=rows)).yardstick == "judge"
    assert read_run(make_run(tmp_path / "c", rows=rows)).yardstick is None


@pytest.mark.parametrize("command", ["rlhf quickstart", "", "rlhf train 'half", "python x.py"])
def test_a_command_that_cannot_be_varied_is_replaced_by_a_placeholder(tmp_path: Path, command: str) -> None:
    record = read_run(make_run(tmp_path / "a", run={**RUN, "command": command}))
    assert advice(record, None)[0].command == "rlhf train RECIPE run.name=no-kl kl.beta=0"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0.000"),
        (0.0004, "0.0004"),
        (0.1234, "0.123"),
        (-1.234, "\u22121.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (1e6, "1e+06"),
    ],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert report.number(value) == shown
