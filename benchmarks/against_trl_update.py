"""One update of TRL's RLOOTrainer, of ours and of the closed form: the same weights, the same rollout, the same change?

    OMP_NUM_THREADS=1 python benchmarks/against_trl_update.py

Needs the `dev` extra (TRL) and no network. TRL is handed the completions and the rewards instead of sampling them, and
takes one SGD step without clipping; so does `Updater` with `Reinforce` (sequence credit, leave-one-out, k1), with the
batch whole, cut into a few microbatches and cut into single groups; so does plain autograd on the formula

    −mean_i A_i Σ_t log π(y_it),   A_i = R_i − mean_{j≠i} R_j,   R = r − β Σ_t (log π − log π_ref)

one unpadded row at a time. The policy is moved away from its reference first, or the KL would be 0 and any β would do.

    trl−ours, ours−form, trl−form   max |w − w'| over all weights after the update
    update                          max |w − w before|, the closed form's
    KL part                         max |w − w'|, w' from an update with β = 0: how much of it β accounts for

Exits with 1, and records nothing, where two of the three differ by more than `TOLERANCE`, or where the KL part is too
small for a comparison. With learning rate 1 the update is minus the gradient, here with a largest entry between 0.1 and
1. fp32 keeps 2⁻²⁴ = 6e-8 of a number, and the three add up the same numbers in different orders (padding, batches,
chunks), which costs a few times that: 1e-6 is 16 roundings of a gradient of 1. Real mistakes are far larger (tried with
k = 4): no baseline 0.5, to-go credit 0.1, a divisor of B + 1 0.03, one token masked 0.01, β off by a thousandth 1e-4.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries below are imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"  # or deepspeed, imported by the way, looks for a GPU and says so

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import record
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from rlhf.interfaces import Alone, StatsRequest, TrainState
from rlhf.models.chat import render_prompt
from rlhf.models.layout import plain_rows
from rlhf.models.load import load_causal_lm
from rlhf.models.policy import ScoredModel
from rlhf.models.reference import FrozenReference
from rlhf.models.scratch import EOS_ID, SPECIAL_TOKENS, build_causal_lm, build_config, train_tokenizer
from rlhf.objectives.reinforce import Reinforce
from rlhf.rollout import Prompt, Rollout
from rlhf.runtime import microbatches
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.updater import PolicyForward, Term, Updater

TOLERANCE = 1e-6
LEARNING_RATE = 1.0  # the update is minus the gradient, which a later reader can check by hand
VOCAB, HIDDEN, LAYERS = 300, 32, 2
PROMPTS = (  # of different lengths, so that both sides have to pad on the left
    "good",
    "the film was a quiet wonder",
    "nobody minded the end of it, and",
    "so",
    "a slow start, then the long road home and",
    "the cast was",
)

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """samples: k completions of each prompt. longest: completions have 1 to this many tokens. beta: KL coefficient."""

    family: str
    prompts: int
    samples: int
    longest: int
    beta: float


CASES = (
    Case(family="gemma", prompts=6, samples=2, longest=5, beta=0.05),
    Case(family="gemma", prompts=4, samples=4, longest=9, beta=0.3),
    Case(family="gemma2", prompts=4, samples=4, longest=9, beta=0.1),
    Case(family="gemma", prompts=4, samples=8, longest=12, beta=0.5),
)


class FixedRolloutTrainer(RLOOTrainer):
    """TRL's trainer with a given rollout in place of generation; nothing after it is touched."""

    rollout: Rollout

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> list[list[int]]:
        """Another tokenisation or order of the prompts would compare two different updates."""
        if prompt_ids != kept_ids(self.rollout.prompt_ids, self.rollout.prompt_mask):
            raise ValueError("TRL has tokenised or ordered the prompts differently")
        return kept_ids(self.rollout.completion_ids, self.rollout.completion_mask)


def kept_ids(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Token rows without their padding."""
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


def write_reference(case: Case, folder: str) -> Any:
    """A random model and its tokenizer as a transformers folder: TRL loads its reference by path. The tokenizer."""
    tokenizer = train_tokenizer(PROMPTS * 2, VOCAB)
    config = build_config(case.family, layers=LAYERS, hidden_size=HIDDEN, heads=2, vocab_size=len(tokenizer))
    build_causal_lm(config, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def moved_policy(folder: str, shift: float = 0.02) -> PreTrainedModel:
    """The reference plus seeded noise: the same policy for everybody, with log-ratios that are not 0."""
    policy = cast(PreTrainedModel, load_causal_lm(folder))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(shift * torch.randn(parameter.shape, generator=generator))
    return policy


def weights(model: nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def distance(one: Weights, other: Weights) -> float:
    """Largest difference over all weights. Raises ValueError where the two do not have the same ones."""
    if one.keys() != other.keys():
        raise ValueError(f"different weights: {sorted(one.keys() ^ other.keys())}")
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def fixed_rollout(case: Case, tokenizer: Any) -> Rollout:
    """Random completions of uneven lengths with random rewards; every third one lacks its stop token."""
    generator = torch.Generator().manual_seed(2)
    rows = range(case.prompts * case.samples)
    prompts = [Prompt(row_id=index, text=text) for index, text in enumerate(PROMPTS[: case.prompts])]
    ids = [render_prompt(tokenizer, prompt) for prompt in prompts]
    completions = []
    for row in rows:
        length = 1 + row * 5 % case.longest
        drawn = torch.randint(len(SPECIAL_TOKENS), len(tokenizer), (length,), generator=generator).tolist()
        completions.append(drawn if row % 3 == 2 else [*drawn[:-1], EOS_ID])
    return Rollout.from_ids(
        [ids[row // case.samples] for row in rows],
        completions,
        group=[row // case.samples for row in rows],
        prompts=tuple(prompts[row // case.samples] for row in rows),
        texts=tuple("" for _ in rows),
        sample=torch.tensor([row % case.samples for row in rows]),
        finished=torch.tensor([row % 3 != 2 for row in rows]),
        rewards=torch.randn(len(rows), generator=generator),
    )


def trl_settings(case: Case, rows: int, output: str) -> RLOOConfig:
    """Plain SGD in fp32 over the whole batch: nothing between the gradient and the weights."""
    return RLOOConfig(
        output_dir=output,
        per_device_train_batch_size=rows,
        num_generations=case.samples,
        max_completion_length=case.longest,
        max_steps=1,
        beta=case.beta,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        weight_decay=0.0,
        bf16=False,
        use_cpu=True,
        shuffle_dataset=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def trl_update(case: Case, folder: str, tokenizer: Any, rollout: Rollout) -> Weights:
    """The weights after one step of TRL's trainer on the given rollout."""
    assert rollout.rewards is not None
    rewards = rollout.rewards.tolist()
    trainer = FixedRolloutTrainer(
        model=moved_policy(folder),
        reward_funcs=lambda completion_ids, **_: rewards,  # called once, with the rows in the rollout's order
        args=trl_settings(case, len(rollout), f"{folder}/trl"),
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS[: case.prompts])}),
        processing_class=tokenizer,
    )
    trainer.rollout = rollout
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return weights(cast(nn.Module, trainer.model))


def our_update(case: Case, folder: str, rollout: Rollout, budget: int) -> tuple[Weights, int]:
    """The weights after one step of ours, and the number of microbatches it took."""
    policy, reference = ScoredModel(moved_policy(folder)), FrozenReference(ScoredModel(load_causal_lm(folder)))
    scored = microbatches.score(rollout, lambda batch: reference.stats(plain_rows(batch), StatsRequest()), budget)
    objective = Reinforce(beta=case.beta, estimator="k1", credit="sequence", baseline="leave_one_out")
    prepared, _ = objective.prepare(replace(rollout, ref_logprobs=scored.logprobs), TrainState(), Alone())
    updater = Updater(
        runtime=Runtime(accelerator=None, kind="single", device=torch.device("cpu")),
        model=policy,
        optimizer=torch.optim.SGD(policy.parameters(), lr=LEARNING_RATE),
        learning_rate=lambda step: LEARNING_RATE,
        forward=PolicyForward(reference),
        microbatch_tokens=budget,
        max_grad_norm=None,
    )
    report = updater.step([Term(objective=objective, batch=prepared)], 1)
    return weights(policy.causal_lm), report.microbatches


def row_logprobs(model: nn.Module, rollout: Rollout, row: int) -> Tensor:
    """log π(y_t) of one completion's tokens, float64, from an fp32 forward over a row without padding and mask."""
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
    completion = rollout.completion_ids[row][rollout.completion_mask[row]]
    logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return cast(Tensor, logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0].double())


def closed_form_update(case: Case, folder: str, rollout: Rollout) -> Weights:
    """The formula at the top, written out: neither side's masking, batching, baselines or KL.

    Sums over tokens are float64: near 90 nats fp32 is 4e-6 coarse, and log π − log π_ref from two such sums would carry
    that into the advantage.
    """
    assert rollout.rewards is not None
    policy, reference = moved_policy(folder), load_causal_lm(folder)
    rows = range(len(rollout))
    logprobs = torch.stack([row_logprobs(policy, rollout, row).sum() for row in rows])
    with torch.no_grad():
        kl = logprobs - torch.stack([row_logprobs(reference, rollout, row).sum() for row in rows])
        penalized = (rollout.rewards - case.beta * kl).view(-1, case.samples)
        others = (penalized.sum(1, keepdim=True) - penalized) / (case.samples - 1)
        advantages = (penalized - others).flatten()
    loss: Any = -(advantages * logprobs).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            assert parameter.grad is not None
            parameter.sub_(LEARNING_RATE * parameter.grad)
    return weights(policy)


def budgets(rollout: Rollout) -> tuple[int, int, int]:
    """Microbatch budgets in tokens: everything at once, half of it, one group at a time (a group is never cut)."""
    whole = len(rollout) * (rollout.prompt_ids.shape[1] + rollout.completion_ids.shape[1])
    return whole, whole // 2, 1


def compare(case: Case) -> list[dict[str, Any]]:
    """One row for each way of cutting our batch; TRL sees it whole, the closed form row by row."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_reference(case, folder)
        rollout = fixed_rollout(case, tokenizer)
        before = weights(moved_policy(folder))
        theirs, form = trl_update(case, folder, tokenizer, rollout), closed_form_update(case, folder, rollout)
        without_kl = closed_form_update(replace(case, beta=0.0), folder, rollout)
        rows = []
        for budget in budgets(rollout):
            ours, cuts = our_update(case, folder, rollout, budget)
            found = {
                "trl_minus_ours": distance(theirs, ours),
                "ours_minus_form": distance(ours, form),
                "trl_minus_form": distance(theirs, form),
                "update": distance(form, before),
                "kl_part": distance(form, without_kl),
            }
            rounded = {name: float(f"{value:.3g}") for name, value in found.items()}
            rows.append({**asdict(case), "microbatches": cuts, **rounded})
    return rows


def show(row: dict[str, Any]) -> str:
    shape = f"{row['family']:7s} {row['prompts']:7d} {row['samples']:2d} {row['longest']:7d} {row['beta']:5.2f}"
    errors = f"{row['trl_minus_ours']:9.1e} {row['ours_minus_form']:9.1e} {row['trl_minus_form']:9.1e}"
    return f"{shape} {row['microbatches']:12d} {errors} {row['update']:8.4f} {row['kl_part']:8.4f}"


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for each difference above the tolerance, and for a comparison that could not have failed."""
    found = []
    for row in rows:
        where = f"{row['family']}, k={row['samples']}, beta={row['beta']}, {row['microbatches']} microbatches"
        for name in ("trl_minus_ours", "ours_minus_form", "trl_minus_form"):
            if not row[name] <= TOLERANCE:  # also where it is NaN
                found.append(f"{where}: {name} is {row[name]:.1e}, above {TOLERANCE:.0e} (update {row['update']:.2g})")
        if not row["kl_part"] >= 1000 * TOLERANCE:
            found.append(f"{where}: the KL moves weights by {row['kl_part']:.1e} only, too little to be compared")
    return found


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL and transformers about each other's old names
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    print("family  prompts  k longest  beta microbatches  trl-ours ours-form  trl-form   update  KL part", flush=True)
    rows = []
    for case in CASES:
        for row in compare(case):
            rows.append(row)
            print(show(row), flush=True)
    if found := failures(rows):
        print("\n".join(f"FAILED {line}" for line in found), file=sys.stderr)
        return 1
    settings = {
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "model": f"hidden {HIDDEN}, {LAYERS} layers, vocabulary {VOCAB}, fp32",
        "optimizer": f"SGD, learning rate {LEARNING_RATE}, no clipping",
        "tolerance": TOLERANCE,
    }
    record.write("against_trl_update", settings, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
