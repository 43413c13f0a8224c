from __future__ import annotations

import random

import pytest

from rlhf.tracking.redact import printable, redact, redact_text


@pytest.fixture(autouse=True)
def no_secrets_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"HF_TOKEN": "canary-from-the-environment", "SHORT_KEY": "a", "HOME": "/root"})


def test_secrets_go_and_everything_else_stays() -> None:
    recipe = {
        "policy": {"path": "google/gemma-7b-it", "revision": "0123456789abcdef0123456789abcdef01234567"},
        "reward": {"models": [{"url": "https://user:canary@host:8000/score", "token_env": "RM_TOKEN"}]},
        "data": {"max_prompt_tokens": 512, "eos_token": "<eos>", "pad_token": "<pad>"},
        "tracking": {"api_key": "canary", "wandb_token": "canary", "password": "canary", "key": "canary"},
        "note": "use hf_canaryCANARY0123456789 or canary-from-the-environment",
    }
    clean = redact(recipe)
    assert "canary" not in str(clean).lower()
    assert clean["policy"] == recipe["policy"] and clean["data"] == recipe["data"]
    assert clean["reward"]["models"][0] == {"url": "https://[redacted]@host:8000/score", "token_env": "RM_TOKEN"}
    assert recipe["tracking"]["api_key"] == "canary", "the original is not touched"


@pytest.mark.parametrize(
    "text",
    [
        "rlhf train r.yaml reward.token=canary",
        "Authorization: Bearer canary",
        "http://me:canary@host/x",
        "sk-canaryCANARYcanary0123",
        "ghp_canaryCANARYcanary0123",
        "ValueError: canary-from-the-environment is wrong",
    ],
)
def test_secrets_in_text(text: str) -> None:
    assert "canary" not in redact_text(text).lower()


def test_ordinary_text_is_left_alone() -> None:
    text = "rlhf train r.yaml kl.beta=0.1 data.eos_token=<eos> run.name=a policy.path=google/gemma-2b user@host task-1"
    assert redact_text(text) == text


def test_control_characters_are_spelled_out() -> None:
    assert printable("a\x1b[31mb\r\x00\x7f\x9b") == "a\\x1b[31mb\\x0d\\x00\\x7f\\x9b"
    assert printable("\u202eabc\u2066\u200f\ud800") == "\\u202eabc\\u2066\\u200f\\ud800"
    assert printable("two\nlines\t") == "two\nlines\t"
    assert printable("two\nlines\t", newlines=False) == "two\\nlines\\t"
    assert printable("é 漢字 🙂 שלום") == "é 漢字 🙂 שלום"


def test_a_thousand_random_strings_show_no_control_character() -> None:
    generator = random.Random(0)
    for _ in range(1000):
        codes = [generator.choice([generator.randrange(0x250), generator.randrange(0x11000)]) for _ in range(40)]
        text = "".join(map(chr, codes))
        shown = printable(text, newlines=False)
        assert all(ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0 and not 0xD800 <= ord(c) < 0xE000 for c in shown)
        shown.encode()
