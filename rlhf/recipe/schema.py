"""The recipe: every key, its type, its bounds and its default. Reads no file and imports no torch.

Sections of other objectives are always legal, so that ``objective:`` can be changed without touching another line.
Scalars are strict: the text ``"10"`` is no number, ``yes`` is no boolean. Rules between keys are in ``rules.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, WrapValidator
from pydantic_core import core_schema

from rlhf.recipe.marks import dump

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Placement = Literal["auto", "replicate", "zero3", "offload", "quantized"]
Baseline = Literal[
    "none", "moving_average", "batch_mean", "leave_one_out", "shrinkage", "greedy", "value", "optimal_token"
]
Dotted = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]


def _from_list(value: Any, handler: core_schema.ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    return handler(tuple(value) if isinstance(value, list) else value)


# A YAML list is a tuple here: a frozen recipe holds nothing that can be appended to.
_LIST = WrapValidator(_from_list)


class Section(BaseModel):
    """Frozen; unknown keys are errors; numbers are numbers, finite, and never text or booleans."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Run(Section):
    """What the run is called, where it lies, how long it goes on."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Letters, digits, `.`, `_`, `-`; at most 64.")
    output_dir: str = Field(
        "runs/{name}-{objective}", description="Run directory; `{name}` and `{objective}` are filled in."
    )
    seed: int = Field(42, ge=0, lt=2**63, description="All randomness is a pure function of this and the step.")
    steps: int | None = Field(
        None, ge=1, description="Steps of the objective: rollouts, or optimizer steps of sft and reward; null = epochs."
    )
    max_seconds: float | None = Field(None, gt=0, description="Save and end when this much time has passed (seconds).")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: go on from the newest complete checkpoint. never: start anew in `<dir>-2`, `-3`, …"
    )


class Scratch(Section):
    """A randomly initialised model, with a tokenizer trained on `data.train` unless `policy.tokenizer` is given."""

    family: Literal["gemma", "gemma2", "gemma3", "gemma4"] = Field("gemma", description="Architecture.")
    layers: int = Field(4, ge=1, le=200, description="Transformer blocks.")
    hidden_size: int = Field(128, ge=8, le=65536, description="Width of the residual stream; divisible by `heads`.")
    heads: int = Field(4, ge=1, le=1024, description="Attention heads.")
    vocab_size: int = Field(4096, ge=64, le=2**20, description="Tokens of the tokenizer that is trained.")
    intermediate_size: int | None = Field(None, ge=8, description="Width of the MLP; null = the family's usual ratio.")


class Lora(Section):
    """Low-rank adapters on a frozen policy; the reference is then the policy with its adapters switched off."""

    r: int = Field(16, ge=1, le=4096, description="Rank.")
    alpha: float = Field(32.0, gt=0, description="Scale; the update is multiplied by alpha / r.")
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], _LIST] = Field(
        "all-linear", description="`all-linear`, or the names of the modules that get an adapter."
    )


class Policy(Section):
    """The trained model, whatever the objective (`reward` puts a scalar head on it)."""

    path: str | None = Field(None, min_length=1, description="Hub id or local folder; give this or `scratch`.")
    scratch: Scratch | None = Field(None, description="Random weights instead of `path`.")
    tokenizer: str | None = Field(
        None, min_length=1, description="Only with `scratch`: folder or hub id whose tokenizer is used; null = train one."
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Arithmetic of the forward; auto: bf16 where the hardware has it. Weights are fp32 always."
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        "auto", description="Attention implementation; auto = the model's own choice."
    )
    chat_template: str = Field("auto", min_length=1, description="auto = the tokenizer's own; or a .jinja file.")
    lora: Lora | None = Field(None, description="null = all weights are trained.")


class Reference(Section):
    """The model that the KL penalty holds the policy to."""

    path: str | None = Field(None, min_length=1, description="null = frozen copy of the policy, or the adapter off.")
    ema: float = Field(0.0, ge=0, lt=1, description="Decay of a moving reference; 0 = it never moves.")
    placement: Placement = Field("auto", description="Where its weights lie.")


class Value(Section):
    """The value model of actor-critic objectives."""

    init: Literal["reward", "policy", "zeros"] = Field("reward", description="What it starts from.")
    shared: bool = Field(False, description="A head on the policy instead of a model of its own.")
    lr: Positive = Field(9.0e-6, description="Learning rate.")
    clip: NonNegative = Field(0.2, description="Clip range of its loss.")


class RewardModel(Section):
    """One reward model: a folder or hub id, or a server."""

    path: str | None = Field(None, min_length=1, description="Hub id or local folder; give this or `url`.")
    url: str | None = Field(None, min_length=1, description="A reward server.")
    token_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Name of the environment variable with its token."
    )
    weight: float = Field(1.0, description="Share in `combine`; 0 = logged, not trained on.")
    placement: Placement = Field("auto", description="Where its weights lie.")
    microbatch_tokens: Count | None = Field(None, description="Tokens of one forward; null = `batch.microbatch_tokens`.")


class RewardFunction(Section):
    """A Python function with TRL's signature."""

    call: Dotted = Field(description="`package.module:function`.")
    weight: float = Field(1.0, description="Added as weight · score; 0 = logged, not trained on.")


class Reward(Section):
    """Where scores come from and how they become one number."""

    models: Annotated[tuple[RewardModel, ...], _LIST] = Field((), description="Reward models.")
    functions: Annotated[tuple[RewardFunction, ...], _LIST] = Field((), description="Reward functions.")
    combine: Literal["mean", "min", "uwo"] = Field(
        "mean", description="Over models: Σw·s/Σw, the lowest, or mean − variance. Functions are added afterwards."
    )
    clip: Positive | None = Field(None, description="Rewards are clipped to ± this.")
    missing_eos_score: float | None = Field(
        -1.0, description="Replaces the score of a completion without a stop token; null = leave it."
    )


class DataSource(Section):
    """One source of rows."""

    path: str = Field(min_length=1, description="Hub id, local file or folder, or `package.module:function`.")
    split: str = Field("train", min_length=1, description="Split of a hub data set or folder; not read for a file.")
    format: str = Field("auto", min_length=1, description="How rows are read; auto = by their columns.")
    weight: Positive = Field(1.0, description="Share in the mixture.")
    columns: dict[str, str] = Field({}, description="Renames: name the toolkit knows → column of the file.")
    max_rows: Count | None = Field(None, description="Only the first rows; null = all.")


class Data(Section):
    """Rows to train on and to measure on."""

    train: Annotated[tuple[DataSource, ...], _LIST] = Field((), description="Training rows; at least one source.")
    instruction: Annotated[tuple[DataSource, ...], _LIST] = Field((), description="Gold rows of `instruction`.")
    eval: Annotated[tuple[DataSource, ...], _LIST] = Field((), description="Held-out rows.")
    prompt_tokens: Count | None = Field(None, description="Plain text only: this many first tokens are the prompt.")
    max_prompt_tokens: Count = Field(512, description="Longest prompt (tokens).")
    long_prompts: Literal["drop", "truncate_left"] = Field("drop", description="What happens to longer ones.")
    system_role: Literal["error", "merge", "drop"] = Field(
        "error", description="System turns where the template has none: refuse, put before the user turn, or leave out."
    )


class RolloutSettings(Section):
    """How completions are sampled. Nothing truncates the distribution: the sampled policy is the scored one."""

    engine: Literal["hf", "vllm"] = Field("hf", description="What decodes.")
    samples_per_prompt: Count = Field(4, description="k, the size of a group.")
    max_new_tokens: Count = Field(256, description="Longest completion (tokens).")
    temperature: Positive = Field(1.0, description="Divides the logits in rollout, reference and training.")
    stop: Annotated[tuple[str, ...], _LIST] = Field((), description="Stop strings beside the tokenizer's stop tokens.")


class Kl(Section):
    """The KL penalty toward the reference; nats summed over a completion."""

    beta: NonNegative = Field(0.05, description="Coefficient in the reward.")
    estimator: Literal["k1", "exact"] = Field("k1", description="exact: over the full vocabulary, far less variance.")
    credit: Literal["sequence", "to_go"] = Field("sequence", description="Which tokens pay; not read with exact.")
    loss_beta: NonNegative = Field(0.0, description="Coefficient of a second KL term, in the loss.")
    loss_estimator: Literal["k2", "exact_local", "k3"] = Field("k2", description="Its form.")
    target: Positive | None = Field(None, description="Adapt beta toward this KL (nats); null = beta is fixed.")


class Instruction(Section):
    """Negative log-likelihood of gold completions, mixed into every update."""

    coefficient: NonNegative = Field(0.0, description="0 = off; needs `data.instruction`.")


class ReinforceSettings(Section):
    """Settings of objective `reinforce`."""

    baseline: Baseline = Field("leave_one_out", description="What is subtracted from the reward.")
    updates_per_rollout: Count = Field(1, description="Optimizer steps per rollout.")


class Ppo(Section):
    """Settings of objective `ppo`."""

    clip: NonNegative = Field(0.2, lt=1, description="Clip range of the ratio.")
    gamma: Probability = Field(1.0, description="Discount.")
    gae_lambda: Probability = Field(0.95, description="λ of the advantage estimator.")
    epochs: Count = Field(2, description="Passes over a rollout.")
    minibatches: Count = Field(1, description="Optimizer steps of a pass.")


class Dpo(Section):
    """Settings of objective `dpo`."""

    beta: Positive | None = Field(None, description="null = `kl.beta`.")
    loss: Literal["sigmoid", "ipo", "robust"] = Field("sigmoid", description="Loss of a pair.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of labels taken to be wrong.")
    online: bool = Field(False, description="Pairs come from the policy's own completions.")
    labels: Literal["soft", "hard"] = Field("soft", description="Online labels: σ(r_w − r_l), or 1.")


class Sft(Section):
    """Settings of objective `sft`."""

    completion_only: bool = Field(True, description="Only completion tokens count in the loss.")
    epochs: Count = Field(1, description="Passes over `data.train`, unless `run.steps` is set.")
    packing: bool = Field(False, description="Several rows in one sequence.")


class RewardModelSettings(Section):
    """Settings of objective `reward`."""

    pairs_per_prompt: Count | None = Field(None, description="null = all pairs of a prompt.")
    margin: Literal["auto", "none"] = Field("auto", description="auto: the rows' margin where they have one.")
    center: bool = Field(True, description="Shift the head so that demonstrations average 0.")
    epochs: Count = Field(1, description="Passes over `data.train`, unless `run.steps` is set.")


class Optim(Section):
    """AdamW without weight decay, and its schedule."""

    lr: Positive = Field(1.0e-6, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="After the warm-up.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps with a rising rate.")
    max_grad_norm: Positive | None = Field(1.0, description="Gradients are clipped to this norm; null = never.")
    eps: Positive = Field(1.0e-8, description="AdamW's ε.")


class Batch(Section):
    """Sizes, global over all ranks; gradient accumulation is derived."""

    prompts_per_step: Count = Field(128, description="Prompts of a rollout; rows of sft, pairs of reward.")
    microbatch_tokens: Count = Field(16384, description="Tokens of one forward and backward.")


class Eval(Section):
    """Measuring on `data.eval` while training."""

    every_steps: Count | None = Field(50, description="null = only at the end.")
    samples: Count = Field(64, description="Held-out prompts.")
    functions: Annotated[tuple[Dotted, ...], _LIST] = Field((), description="`package.module:function`, logged only.")
    keep_best: str | None = Field(None, min_length=1, description="Metric whose best checkpoint is kept.")


class Checkpoint(Section):
    """Saving what a restart needs."""

    every_steps: Count | None = Field(100, description="null = only when told to stop.")
    keep: Count = Field(2, description="Newest checkpoints kept.")
    hub_id: str | None = Field(None, min_length=1, description="Nothing is pushed unless this is set.")


class Tracking(Section):
    """Mirrors of metrics.jsonl, which is always written."""

    to: Annotated[tuple[Literal["wandb"], ...], _LIST] = Field(("wandb",), description="[] = files only.")
    project: str = Field("rlhf", min_length=1, description="Project name there.")
    samples: int = Field(8, ge=0, description="Completions logged per step.")


class Recipe(Section):
    """One run. `objective` and `run.name` are required; everything else has a default."""

    objective: str = Field(min_length=1, description="reinforce | sft | reward, or `package.module:Class`.")
    run: Run
    policy: Policy = Policy()
    reference: Reference = Reference()
    value: Value = Value()
    reward: Reward = Reward()
    data: Data = Data()
    rollout: RolloutSettings = RolloutSettings()
    kl: Kl = Kl()
    instruction: Instruction = Instruction()
    reinforce: ReinforceSettings = ReinforceSettings()
    ppo: Ppo = Ppo()
    dpo: Dpo = Dpo()
    sft: Sft = Sft()
    reward_model: RewardModelSettings = RewardModelSettings()
    optim: Optim = Optim()
    batch: Batch = Batch()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @property
    def output_dir(self) -> Path:
        """The run directory, placeholders filled in; relative to the working directory."""
        return Path(fill(self.run.output_dir, self.run.name, self.objective)).expanduser()

    def to_yaml(self) -> str:
        """Every key with its value, in the order of the schema; loading it gives an equal recipe."""
        return dump(self.model_dump(mode="json"))

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Dotted key → (mine, the other's) for every value that differs; lists are compared entry by entry."""
        mine, theirs = dict(flat(self.model_dump(mode="json"))), dict(flat(other.model_dump(mode="json")))
        keys = [*mine, *(key for key in theirs if key not in mine)]
        return {key: (mine.get(key), theirs.get(key)) for key in keys if mine.get(key) != theirs.get(key)}


def fill(output_dir: str, name: str, objective: str) -> str:
    """``output_dir`` with its placeholders replaced; an outside objective's ``module:Class`` becomes a file name."""
    return output_dir.replace("{name}", name).replace("{objective}", re.sub(r"[^A-Za-z0-9._-]", "-", objective))


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, scalar) of nested mappings and lists; an empty one counts as a scalar."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    if not items:
        yield prefix, value
    for key, entry in items:
        yield from flat(entry, f"{prefix}.{key}" if prefix else str(key))
