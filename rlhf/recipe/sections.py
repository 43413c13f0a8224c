"""The sections of a recipe: every key, its type, its bounds and its default.

Sections of other objectives are always legal, so that ``objective:`` can be changed without touching another line.
Scalars are strict: the text ``"10"`` is no number, ``yes`` is no boolean. Rules between keys are in ``rules.py``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, WrapValidator
from pydantic_core import core_schema

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Placement = Literal["auto", "replicate", "zero3", "offload"]
RewardPlacement = Literal["auto", "replicate", "zero3", "offload", "policy_base"]
Bits = Literal["4bit", "8bit"]
PLACEMENT = "auto: whole on every process; zero3: sharded over them; offload: in host memory while it is idle (GPU)."
QUANTIZE = "Weights of its linear layers by bitsandbytes: 8bit: int8 a row; 4bit: NF4 a block; null = as they are."
Baseline = Literal[
    "none",
    "moving_average",
    "batch_mean",
    "group_mean",
    "leave_one_out",
    "shrinkage",
    "greedy",
    "value",
    "optimal_token",
]
Dotted = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
KnownFormat = Literal[  # rlhf.data.formats.FORMATS, in its order: the order in which formats are looked for
    "auto",
    "chat",
    "hh_rlhf",
    "preference",
    "summaries",
    "ultrafeedback",
    "messages",
    "sharegpt",
    "helpsteer",
    "completion",
    "alpaca",
    "gsm8k",
    "prompt",
    "text",
]
RowFormat = KnownFormat | Dotted


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
        default="runs/{name}-{objective}", description="Run directory; `{name}` and `{objective}` are filled in."
    )
    seed: int = Field(default=42, ge=0, lt=2**63, description="All randomness is a pure function of this and the step.")
    steps: int | None = Field(
        default=None,
        ge=1,
        description="Rollouts, or optimizer steps of sft and reward; null = their epochs, or every prompt once.",
    )
    max_seconds: float | None = Field(
        default=None, gt=0, description="Save and end when this much time has passed (seconds)."
    )
    resume: Literal["auto", "never"] = Field(
        default="auto",
        description="auto: go on from the newest complete checkpoint. never: start anew in `<dir>-2`, `-3`, …",
    )
    memory_check: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Before anything is loaded, refuse what `rlhf plan` finds too large. auto: on GPUs alone.",
    )


class Scratch(Section):
    """A randomly initialised model, with a tokenizer trained on `data.train` unless `policy.tokenizer` is given."""

    family: Literal["gemma", "gemma2", "gemma3", "gemma4"] = Field(default="gemma", description="Architecture.")
    layers: int = Field(default=4, ge=1, le=200, description="Transformer blocks.")
    hidden_size: int = Field(
        default=128, ge=8, le=65536, description="Width of the residual stream; divisible by `heads`."
    )
    heads: int = Field(default=4, ge=1, le=1024, description="Attention heads.")
    vocab_size: int = Field(default=4096, ge=300, le=2**20, description="Tokens of the tokenizer that is trained.")
    intermediate_size: int | None = Field(
        default=None, ge=8, description="Width of the MLP; null = the family's usual ratio."
    )


class Lora(Section):
    """Low-rank adapters on a frozen policy; the reference is then the policy with its adapters switched off."""

    r: int = Field(default=16, ge=1, le=4096, description="Rank.")
    alpha: float = Field(default=32.0, gt=0, description="Scale; the update is multiplied by alpha / r.")
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], _LIST] = Field(
        default="all-linear", description="`all-linear`, or the names of the modules that get an adapter."
    )


class Policy(Section):
    """The trained model, whatever the objective (`reward` puts a scalar head on it)."""

    path: str | None = Field(default=None, min_length=1, description="Hub id or local folder; give this or `scratch`.")
    scratch: Scratch | None = Field(default=None, description="Random weights instead of `path`.")
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="Only with `scratch`: folder or hub id whose tokenizer is used; null = train one.",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Arithmetic of the forward; auto: bf16 where the hardware has it. Weights are fp32 always.",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        default="auto", description="Attention implementation; auto = the model's own choice."
    )
    chat_template: str = Field(
        default="auto", min_length=1, description="auto = the tokenizer's own; or a .jinja file."
    )
    lora: Lora | None = Field(default=None, description="null = all weights are trained.")
    quantize: Literal["4bit"] | None = Field(
        default=None, description="4bit: the frozen weights below `lora` in NF4 (QLoRA), the adapter in float32."
    )


class Reference(Section):
    """The model that the KL penalty holds the policy to."""

    path: str | None = Field(
        default=None, min_length=1, description="null = frozen copy of the policy, or the adapter off."
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="It follows the policy: w_ref ← ema·w_ref + (1 − ema)·w after each step; 0 = it never moves.",
    )
    reset_steps: Count | None = Field(
        default=None, description="Every so many steps it becomes the policy as it is then; null = never."
    )
    placement: Placement = Field(default="auto", description=PLACEMENT)
    quantize: Bits | None = Field(default=None, description=QUANTIZE)


class Value(Section):
    """The value model of actor-critic objectives."""

    init: Literal["reward", "policy", "zeros"] = Field(default="reward", description="What it starts from.")
    shared: bool = Field(
        default=False,
        description="A head on the policy (0 at first) instead of a model of its own; `init` is not read.",
    )
    lr: Positive | None = Field(default=None, description="Its peak learning rate; null = `optim.lr`.")
    clip: NonNegative = Field(default=0.2, description="Clip range of its loss.")
    coefficient: NonNegative = Field(
        default=0.1, description="Weight of its loss, which gradient clipping sees; 0 = it stays as it starts."
    )
    warmup_steps: int = Field(default=0, ge=0, description="The first rollouts train it alone.")


class RewardSource(Section):
    """One reward model: a folder or hub id, or behind a server."""

    path: str | None = Field(default=None, min_length=1, description="Hub id or local folder; give this or `url`.")
    url: str | None = Field(
        default=None,
        min_length=1,
        description="`rlhf serve-reward`, as http://host:port; several that hold one model with commas between them.",
    )
    token_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Name of the environment variable with the server's token.",
    )
    give_up_seconds: Annotated[float, Field(gt=0, le=1100)] = Field(
        default=600.0,
        description="A server that stays away for so long ends the run, which can be resumed (exit code 75).",
    )
    send: Literal["text", "ids"] = Field(
        default="text",
        description="What a server is sent; ids: the policy's own tokens, where vocabulary and template are the same.",
    )
    microbatch_tokens: Count | None = Field(
        default=None, description="Tokens of one forward; null = `batch.microbatch_tokens`."
    )
    quantize: Bits | None = Field(default=None, description=QUANTIZE)


class RewardModel(RewardSource):
    """A reward model that is trained on."""

    weight: float = Field(default=1.0, description="Share in `combine`; 0 = logged, not trained on.")
    placement: RewardPlacement = Field(
        default="auto",
        description=f"{PLACEMENT} policy_base: as a second adapter on the policy's base, which it was trained on.",
    )


class RewardFunction(Section):
    """A Python function with TRL's signature."""

    call: Dotted = Field(description="`package.module:function`.")
    weight: float = Field(default=1.0, description="Added as weight · score; 0 = logged, not trained on.")


class Overlong(Section):
    """A price for length: rewards fall by `per_token` for every completion token beyond `from_tokens`."""

    from_tokens: Count = Field(description="Completions up to this length pay nothing (tokens).")
    per_token: Positive = Field(description="Reward lost per token beyond it.")


class Reward(Section):
    """Where scores come from and how they become one number."""

    models: Annotated[tuple[RewardModel, ...], _LIST] = Field(default=(), description="Reward models.")
    functions: Annotated[tuple[RewardFunction, ...], _LIST] = Field(default=(), description="Reward functions.")
    combine: Literal["mean", "min", "uwo"] = Field(
        default="mean",
        description="Over models: Σw·s/Σw, the lowest, or mean − variance. Functions are added afterwards.",
    )
    clip: Positive | None = Field(default=None, description="Rewards are clipped to ± this.")
    overlong: Overlong | None = Field(default=None, description="Length shaping, after `clip`; null = length is free.")
    missing_eos_score: float | None = Field(
        default=-1.0, description="Replaces the score of a completion without a stop token; null = leave it."
    )


class DataSource(Section):
    """One source of rows."""

    path: str = Field(min_length=1, description="Hub id, local file or folder, or `package.module:function`.")
    subset: str | None = Field(
        default=None, min_length=1, description="Configuration of a hub data set, such as `main`."
    )
    split: str = Field(
        default="train", min_length=1, description="Split of a hub data set or folder; not read for a file."
    )
    format: RowFormat = Field(
        default="auto", description="How rows are read; auto = by their columns; or `package.module:Class`."
    )
    weight: Positive = Field(default=1.0, description="How often its rows come in an epoch.")
    columns: dict[str, str] = Field(default={}, description="Renames: name the toolkit knows → column of the file.")
    max_rows: Count | None = Field(default=None, description="Only the first rows; null = all.")


class Data(Section):
    """Rows to train on and to measure on."""

    train: Annotated[tuple[DataSource, ...], _LIST] = Field(
        default=(), description="Training rows; at least one source."
    )
    instruction: Annotated[tuple[DataSource, ...], _LIST] = Field(default=(), description="Gold rows of `instruction`.")
    eval: Annotated[tuple[DataSource, ...], _LIST] = Field(default=(), description="Held-out rows.")
    prompt_tokens: Count | None = Field(
        default=None, description="Plain text only: this many first tokens are the prompt."
    )
    max_prompt_tokens: Count = Field(default=512, description="Longest prompt (tokens).")
    long_prompts: Literal["drop", "truncate_left"] = Field(default="drop", description="What happens to longer ones.")
    system_role: Literal["error", "merge", "drop"] = Field(
        default="error",
        description="System turns where the template has none: refuse, put before the user turn, or leave out.",
    )


class RolloutSettings(Section):
    """How completions are sampled. Nothing truncates the distribution: the sampled policy is the scored one."""

    engine: Literal["hf", "vllm"] = Field(
        default="hf", description="What decodes: the policy itself, or vLLM with a copy pushed before each rollout."
    )
    decode: Literal["auto", "generate"] = Field(
        default="auto",
        description="auto: our loop, which reads a prompt once for all its completions, where it knows the model.",
    )
    kv_cache_gib: Positive = Field(
        default=4.0, description="Keys and values of rows decoded at once (GiB); the others wait. Our loop only."
    )
    gather: Literal["whole", "layers"] = Field(
        default="whole",
        description="Under ZeRO-3 and FSDP2. layers: one at a time in every forward; slow, for weights beyond a GPU.",
    )
    samples_per_prompt: Count = Field(default=4, description="k, the size of a group.")
    max_new_tokens: Count = Field(default=256, description="Longest completion (tokens).")
    temperature: Positive = Field(default=1.0, description="Divides the logits in rollout, reference and training.")
    stop: Annotated[tuple[str, ...], _LIST] = Field(
        default=(), description="Stop strings beside the tokenizer's stop tokens."
    )
    mismatch_cap: Positive | None = Field(
        default=2.0,
        description="vLLM rounds otherwise: tokens weigh π/π_vllm, at most this; null = 1. `reinforce`, `ppo` and kin.",
    )
    gpu_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.4, description="Of the GPU's memory, for vLLM's weights, keys and values."
    )
    sleep: bool = Field(default=True, description="On a GPU, vLLM in this process gives its memory back in between.")
    url: str | None = Field(
        default=None, min_length=1, description="Where `rlhf serve-policy` serves; null = in this process."
    )
    token_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Name of the environment variable with that server's token.",
    )
    push_folder: str | None = Field(
        default=None,
        min_length=1,
        description="Weights go to the server through a folder in this one, seen by both; null = `pushed` of the run.",
    )
    ahead: bool = Field(
        default=False,
        description="The server decodes the next step while this one is trained on: completions one update old.",
    )

    @property
    def correction(self) -> float | None:
        """``mismatch_cap`` where another program decodes; whole completions are weighed where they are old besides."""
        return self.mismatch_cap if self.engine == "vllm" and not self.ahead else None


class Kl(Section):
    """The KL penalty toward the reference; nats summed over a completion."""

    beta: NonNegative = Field(default=0.05, description="Coefficient in the reward.")
    estimator: Literal["k1", "exact"] = Field(
        default="k1", description="exact: over the full vocabulary, far less variance."
    )
    credit: Literal["sequence", "to_go"] = Field(
        default="sequence", description="Which tokens pay; not read with exact."
    )
    loss_beta: NonNegative = Field(default=0.0, description="Coefficient of a second KL term, in the loss.")
    loss_estimator: Literal["k2", "exact_local", "k3"] = Field(default="k2", description="Its form.")
    target: Positive | None = Field(default=None, description="`ppo` adapts beta toward this KL (nats); null = fixed.")


class Instruction(Section):
    """Negative log-likelihood of gold completions, mixed into every update."""

    coefficient: NonNegative = Field(default=0.0, description="0 = off; needs `data.instruction`.")


class ReinforceSettings(Section):
    """Settings of objective `reinforce` and of the presets made of it (`rloo`, `remax`, `grpo`, …)."""

    baseline: Baseline = Field(default="leave_one_out", description="What is subtracted from the reward.")
    divide_by: Literal["none", "group_std", "batch_std"] = Field(
        default="none",
        description="What advantages are divided by; a standard deviation turns or rescales the gradient.",
    )
    average: Literal["completions", "completion_tokens", "tokens"] = Field(
        default="completions",
        description="What the loss is a mean over; completion_tokens: completions, log π a mean over their tokens.",
    )
    updates_per_rollout: Count = Field(
        default=1, description="Optimizer steps per rollout; later ones weight whole completions by π/π_old."
    )
    importance_cap: Positive = Field(default=5.0, description="Largest such weight.")
    importance: Literal["truncate", "mask"] = Field(
        default="truncate", description="A completion beyond it weighs `importance_cap`, or nothing."
    )
    skip_zero_variance: bool = Field(
        default=False, description="Leave out groups whose rewards are all equal (they carry the KL gradient alone)."
    )


class Ppo(Section):
    """Settings of objective `ppo`."""

    clip: NonNegative = Field(default=0.2, lt=1, description="Clip range of the ratio.")
    gamma: Probability = Field(default=1.0, description="Discount.")
    gae_lambda: Probability = Field(default=0.95, description="λ of the advantage estimator.")
    epochs: Count = Field(default=2, description="Passes over a rollout.")
    minibatches: Count = Field(default=1, description="Optimizer steps of a pass.")
    stop_kl: Positive | None = Field(
        default=None,
        description="No further pass over a rollout once KL(π_old‖π) exceeds this (nats a completion); null = never.",
    )
    whiten_rewards: bool = Field(default=False, description="Token rewards to variance 1 over a step, their mean kept.")
    whiten_advantages: bool = Field(default=False, description="Mean 0 and variance 1 over the tokens of a step.")


class Trpo(Section):
    """Settings of objective `trpo`, whose gradient is that of section `reinforce`. `optim.lr` is not read."""

    max_kl: Positive = Field(default=0.1, description="How far a step may go: KL(π_new‖π_old), nats a completion.")
    damping: Positive = Field(default=0.1, description="λ in (F + λI)⁻¹g: larger is nearer to the plain gradient.")
    iterations: Count = Field(
        default=10, description="Of conjugate gradient; each costs two forwards and backwards of the rollout."
    )
    backtracks: int = Field(default=10, ge=0, description="How often a step that is too long is halved.")


class Dpo(Section):
    """Settings of objective `dpo`. Offline it learns from the pairs of `data.train`."""

    beta: Positive | None = Field(default=None, description="How strongly the reference holds; null = `kl.beta`.")
    loss: Literal["sigmoid", "ipo", "robust"] = Field(default="sigmoid", description="Loss of a pair.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="Share of labels taken to be wrong.")
    online: bool = Field(default=False, description="Pairs come from the policy's own completions.")
    labels: Literal["soft", "hard"] = Field(default="soft", description="Online labels: σ(r_w − r_l), or 1.")


class Simpo(Section):
    """Settings of objective `simpo`, which learns from the pairs of `data.train`."""

    beta: Positive = Field(default=2.0, description="Scale of log π a token; not `kl.beta`, which weighs whole sums.")
    margin: NonNegative = Field(default=1.0, description="Lead of the better completion, after `beta`.")


class Sft(Section):
    """Settings of objective `sft`."""

    completion_only: bool = Field(default=True, description="Only completion tokens count in the loss.")
    turns: Literal["all", "last"] = Field(
        default="all", description="Of a conversation with several replies: imitate all of them, or the last."
    )
    epochs: Count = Field(default=1, description="Passes over `data.train`, unless `run.steps` is set.")
    packing: bool = Field(default=False, description="Several rows in one sequence.")


class RewardModelSettings(Section):
    """Settings of objective `reward`."""

    pairs_per_prompt: Count | None = Field(
        default=None, description="At most so many of a prompt, drawn anew each epoch; null = all."
    )
    margin: Literal["auto", "none"] = Field(default="auto", description="auto: the rows' margin where they have one.")
    center: bool = Field(default=True, description="Shift the head so that demonstrations average 0.")
    epochs: Count = Field(default=1, description="Passes over `data.train`, unless `run.steps` is set.")


class Optim(Section):
    """AdamW without weight decay, and its schedule."""

    lr: Positive = Field(default=1.0e-6, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="After the warm-up.")
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps with a rising rate.")
    max_grad_norm: Positive | None = Field(default=1.0, description="Gradients are clipped to this norm; null = never.")
    eps: Positive = Field(default=1.0e-8, description="AdamW's ε.")
    kl_step_limit: Positive | None = Field(
        default=None,
        description="A step that goes further is shortened: KL(π_new‖π_old), nats a completion; null = never.",
    )


class Batch(Section):
    """Sizes, global over all ranks; gradient accumulation is derived."""

    prompts_per_step: Count = Field(
        default=128, description="Prompts of a rollout, or of reward with all their pairs; rows of sft."
    )
    microbatch_tokens: Count = Field(default=16384, description="Tokens of one forward and backward.")
    activations: Literal["keep", "recompute", "offload"] = Field(
        default="keep",
        description="What backward needs of the layers: kept; computed again from each layer's input (a third slower); "
        "those inputs in host memory too (GPU).",
    )
    share_prompts: bool = Field(
        default=True,
        description="A prompt once for all its completions in one row, where the model is known and it pays.",
    )


class EvalModel(RewardSource):
    """A reward model that judges held-out completions and is never trained on."""


class Eval(Section):
    """Measuring on `data.eval` while training."""

    every_steps: Count | None = Field(default=50, description="null = only at the end.")
    samples: Count = Field(default=64, description="Held-out prompts.")
    temperature: Positive | None = Field(
        default=None, description="Of held-out completions; null = `rollout.temperature`."
    )
    models: Annotated[tuple[EvalModel, ...], _LIST] = Field(
        default=(), description="Second reward models: they judge held-out completions only."
    )
    functions: Annotated[tuple[Dotted, ...], _LIST] = Field(
        default=(), description="Reward functions that judge held-out completions only."
    )
    keep_best: str | None = Field(
        default=None,
        pattern=r"^eval/[A-Za-z0-9_./-]+$",
        description="Metric (`eval/…`) whose best weights are kept in `best/`; of `eval/loss` and KL the lowest.",
    )


class Checkpoint(Section):
    """Saving what a restart needs."""

    every_steps: Count | None = Field(default=100, description="null = only when told to stop.")
    keep: Count = Field(default=2, description="Newest checkpoints kept.")
    hub_id: str | None = Field(default=None, min_length=1, description="Nothing is pushed unless this is set.")


class Tracking(Section):
    """Mirrors of metrics.jsonl, which is always written."""

    to: Annotated[tuple[Literal["wandb", "tensorboard", "trackio"], ...], _LIST] = Field(
        default=("wandb",), description="[] = files only; wandb is offline without a key."
    )
    project: str = Field(default="rlhf", min_length=1, description="Project name there.")
    samples: int = Field(default=8, ge=0, description="Completions logged per step.")
