"""Words for what is wrong with a recipe: schema errors in the user's terms, suggestions, and values safe to print."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

_LONGEST = 60
_TOKEN = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}"
)
_USER_INFO = re.compile(r"\w+://[^/\s@]+@")
_HEX_KEY = re.compile(r"[0-9a-f]{40}")
_KEY_NAME = re.compile(r"key|token|secret|passw|auth", re.IGNORECASE)

# What other toolkits call it → (what this one calls it). Only names that are not keys here.
SYNONYMS: Mapping[str, str] = {
    "learning_rate": "optim.lr",
    "warmup_steps": "optim.warmup_ratio",
    "model_name_or_path": "policy.path",
    "model_name": "policy.path",
    "base_model": "policy.path",
    "torch_dtype": "policy.compute_dtype",
    "dtype": "policy.compute_dtype",
    "bf16": "policy.compute_dtype",
    "num_generations": "rollout.samples_per_prompt",
    "group_size": "rollout.samples_per_prompt",
    "max_completion_length": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "kl_coef": "kl.beta",
    "kl_coeff": "kl.beta",
    "init_kl_coef": "kl.beta",
    "max_steps": "run.steps",
    "total_steps": "run.steps",
    "batch_size": "batch.prompts_per_step",
    "per_device_train_batch_size": "batch.prompts_per_step",
    "gradient_accumulation_steps": "batch.microbatch_tokens",
    "micro_batch_size": "batch.microbatch_tokens",
    "dataset_name": "data.train",
    "dataset": "data.train",
    "report_to": "tracking.to",
    "save_steps": "checkpoint.every_steps",
    "eval_steps": "eval.every_steps",
    "hub_model_id": "checkpoint.hub_id",
    "reward_funcs": "reward.functions",
    "stage": "objective",
    "algorithm": "objective",
}
# Keys that are missing on purpose, with the reason.
REFUSED: Mapping[str, str] = {
    "top_k": "completions are drawn from the whole distribution, because that is the policy whose logprobs are trained",
    "top_p": "completions are drawn from the whole distribution, because that is the policy whose logprobs are trained",
    "trust_remote_code": "code that comes with a model is not run",
}


def shown(value: Any) -> str:
    """A value as it may appear in a message: short, on one line, secrets blotted out."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"a section of {len(value)} keys"
    if not isinstance(value, str):
        return _short(str(value) if not isinstance(value, int) or abs(value) < 10**_LONGEST else "a huge number")
    return _short(repr(_USER_INFO.sub("***@", _TOKEN.sub("***", value))))


def is_secret(value: str, key: str) -> bool:
    """Whether a string looks like an access token, or like a key in a field named like one."""
    if _TOKEN.search(value) or _USER_INFO.search(value):
        return True
    return bool(_KEY_NAME.search(key) and _HEX_KEY.fullmatch(value))


def near(word: str, words: Iterable[str], cutoff: float = 0.65) -> str | None:
    """The most similar of ``words``, if one is similar enough."""
    return next(iter(difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)), None)


def unknown_key(key: str, siblings: Iterable[str], elsewhere: Mapping[str, tuple[str, ...]]) -> str:
    """Message for an unknown key: that section's keys first, then every section's.

    ``elsewhere``: key → dotted sections that have it ("" is the top).
    """
    if key in REFUSED:
        return f"there is no {key}: {REFUSED[key]}"
    close = near(key, siblings)
    if close:
        return f"unknown key {shown(key)}; did you mean {close}?"
    if key in elsewhere:
        places = " or ".join(f"{place}:" if place else "the top" for place in elsewhere[key])
        return f"unknown key {shown(key)} here; it belongs under {places}"
    if key in SYNONYMS:
        return f"unknown key {shown(key)}; here it is called {SYNONYMS[key]}"
    far = near(key, elsewhere, cutoff=0.75)
    if far:
        return f"unknown key {shown(key)}; did you mean {'.'.join(filter(None, (elsewhere[far][0], far)))}?"
    return f"unknown key {shown(key)}; known here: {', '.join(siblings) or 'none'}"


def schema_error(error: Mapping[str, Any], description: str | None) -> str:
    """One pydantic error in the user's words. ``description``: the field's own, used where a shape is not met."""
    kind, given, context = error["type"], error.get("input"), error.get("ctx") or {}
    if kind == "missing":
        return f"is required: {description or 'give it a value'}"
    if kind == "literal_error":
        return _choice(given, re.findall(r"'([^']*)'", context["expected"]))
    if kind in _WANTED:
        return f"must be {_WANTED[kind]}, not {shown(given)}{_kind(given)}{_quotes(kind, given)}"
    if kind in ("string_pattern_mismatch", "string_too_short") and description:
        return f"{shown(given)} does not fit: {description}"
    return f"{_lower(str(error['msg']).replace('Input ', '').replace('String ', ''))}, not {shown(given)}"


_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list (`[a, b]`, or lines that start with `- `)",
    "dict_type": "a section of `key: value` lines",
    "model_type": "a section of `key: value` lines",
}


def _choice(given: Any, choices: list[str]) -> str:
    close = near(given, choices, cutoff=0.5) if isinstance(given, str) else None
    return f"must be {' | '.join(choices)}, not {shown(given)}" + (f"; did you mean {close}?" if close else "")


def _kind(value: Any) -> str:
    return " (text)" if isinstance(value, str) else ""


def _quotes(kind: str, value: Any) -> str:
    if kind == "string_type" and isinstance(value, (int, float)):
        return "; put it in quotes"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"[-+.\deE]+", value):
        return "; take the quotes away"
    return ""


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
