"""A step on one GPU at Gemma's real sizes, by phase: seconds, tokens a second, MFU, memory bandwidth, peak memory.

    python benchmarks/gpu_step.py                                  2b, 2b-lora and 7b-lora, bf16 arithmetic
    python benchmarks/gpu_step.py --only 2b --batch 256 --new 512
    python benchmarks/gpu_step.py --only tiny --rounds 2           the script itself, also on a CPU

The configurations are Gemma's, the weights random and the prompts random ids, so nothing is downloaded; nothing stops
early. The reward model is another model of the policy's size. MFU of the update: 6 FLOPs a trained weight and token (4
with LoRA), the head at completion positions only, over the device's dense bf16 peak. Bandwidth of decoding: weights in
the type they are multiplied in and the keys and values so far, read once a token position, over the device's.

Writes results/gpu_step.json, on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import record
import torch
from torch import Tensor
from transformers import GemmaConfig, GemmaForCausalLM, GemmaForSequenceClassification

from rlhf.interfaces import Alone, StatsRequest, TokenStats, TrainState
from rlhf.models.layout import SharedPrompts
from rlhf.models.load import LoraSpec, add_lora, keep_activations
from rlhf.models.policy import ScoredModel
from rlhf.models.reference import AdapterOffReference, FrozenReference, Reference
from rlhf.models.scratch import train_tokenizer
from rlhf.objectives.reinforce import Reinforce
from rlhf.rewards.model import RewardModel
from rlhf.rollout import Rollout, TokenBatch
from rlhf.runtime import microbatches
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.updater import PolicyForward, Term, Updater
from rlhf.sampling.loop import DecodeLoop
from rlhf.sampling.noise import position_keys, row_keys, sample_tokens

GEMMA_2B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 256000,
}
GEMMA_7B = {
    **GEMMA_2B,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
TINY = {
    **GEMMA_2B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "vocab_size": 4096,
}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "tiny": (TINY, False),
    "2b": (GEMMA_2B, False),
    "2b-lora": (GEMMA_2B, True),
    "7b-lora": (GEMMA_7B, True),
}
# dense bf16 FLOP/s and bytes/s of one card, from its data sheet
PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "A100": (312e12, 2.0e12)}


@dataclass
class Step:
    """The objects of one step, and what each phase calls."""

    policy: ScoredModel
    reference: Reference
    judge: RewardModel
    updater: Updater
    given: argparse.Namespace
    device: torch.device
    number: int = 0

    @classmethod
    def build(cls, config: dict[str, Any], lora: bool, given: argparse.Namespace, device: torch.device) -> Step:
        torch.manual_seed(0)
        settings = GemmaConfig(**config)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:
            lm: Any = GemmaForCausalLM(settings)
            scalar: Any = GemmaConfig(**config)
            scalar.num_labels = 1
            judge: Any = cast(Any, GemmaForSequenceClassification)(scalar)
            frozen: Any = None if lora else GemmaForCausalLM(settings)
        judge.to(dtype).eval()
        keep_activations(lm, given.activations)
        model: Any = add_lora(lm, LoraSpec(16, 32.0, "all-linear"), 0, task="CAUSAL_LM") if lora else lm
        policy = ScoredModel(model, compute_dtype=dtype, fused=True)
        if frozen is not None:
            frozen.load_state_dict(policy.causal_lm.state_dict())
            frozen.to(dtype).requires_grad_(False)
        reference: Any = (
            AdapterOffReference(policy, policy)
            if frozen is None
            else FrozenReference(ScoredModel(frozen, compute_dtype=dtype))
        )
        runtime = Runtime(accelerator=None, kind="single", device=device)
        trained = [weight for weight in policy.parameters() if weight.requires_grad]
        adam = torch.optim.AdamW(trained, lr=1e-6)
        layout = SharedPrompts()
        forward = PolicyForward(reference, layout)
        updater = Updater(runtime, policy, adam, lambda _: 1e-6, forward, given.tokens, 1.0, layout.cells)
        tokenizer = train_tokenizer(["a small text of words"] * 4, 512)
        source = RewardModel(
            name="judge", model=judge, tokenizer=tokenizer, compute_dtype=dtype, microbatch_tokens=given.tokens
        )
        return cls(policy, reference, source, updater, given, device)

    def sample(self) -> Rollout:
        given = self.given
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        vocab = self.policy.head.out_features
        groups = given.batch // given.k
        prompts = torch.randint(10, min(vocab, 4000), (groups, given.prompt), generator=generator).tolist()
        slots = torch.arange(groups).repeat_interleave(given.k)
        keys = row_keys(0, self.number, slots, torch.arange(given.k).repeat(groups)).to(self.device)

        def choose(logits: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            return sample_tokens(logits, 1.0, position_keys(keys[rows], positions))

        lm: Any = self.policy.causal_lm
        base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        base.eval()
        low = torch.autocast(self.device.type, torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        with torch.no_grad(), low:
            never = torch.zeros(0, dtype=torch.long, device=self.device)
            loop = DecodeLoop(base, given.new, never, choose, given.kv_gib * 2**30)
            found = loop.run(prompts, slots.tolist())
        batch = TokenBatch.from_ids([prompts[slot] for slot in slots], found.ids.tolist(), group=slots.tolist())
        rows = {
            name: getattr(batch, name) for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        }
        empty: Any = {"prompts": (), "texts": (), "sample": slots * 0, "finished": torch.ones(len(batch)).bool()}
        rollout = Rollout(**rows, group=batch.group, valid=batch.valid, **empty, rollout_logprobs=found.logprobs.cpu())
        return rollout.to(self.device)

    def score(self, rollout: Rollout) -> Tensor:
        ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1).tolist()
        groups = [ids[at : at + self.given.k] for at in range(0, len(ids), self.given.k)]
        size = max(1, self.given.tokens // (self.given.prompt + self.given.k * self.given.new))
        parts = [self.judge.forward_groups(groups[at : at + size]) for at in range(0, len(groups), size)]
        return torch.cat(parts).float()

    def reference_pass(self, rollout: Rollout) -> TokenStats:
        layout = SharedPrompts()

        def forward(part: TokenBatch) -> TokenStats:
            return self.reference.stats(layout(part), StatsRequest())

        return microbatches.score(rollout, forward, self.given.tokens, None, layout.cells)

    def update(self, rollout: Rollout) -> Any:
        batch, _ = Reinforce(beta=0.05).prepare(rollout, TrainState(), Alone())
        return self.updater.step([Term(objective=Reinforce(beta=0.05), batch=batch)], self.number)


def timed(device: torch.device, seconds: dict[str, list[float]], name: str, call: Callable[[], Any]) -> Any:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    found = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        seconds.setdefault(f"{name}_peak_gib", []).append(torch.cuda.max_memory_allocated() / 2**30)
    seconds.setdefault(name, []).append(time.perf_counter() - started)
    return found


def measure(name: str, given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    config, lora = CASES[name]
    step, seconds = Step.build(config, lora, given, device), dict[str, list[float]]()
    for turn in range(given.rounds + 1):
        if turn == 1:
            seconds.clear()  # the first warms up
        rollout = timed(device, seconds, "sample", step.sample)
        rollout = replace(rollout, rewards=timed(device, seconds, "score", partial(step.score, rollout)))
        known = timed(device, seconds, "reference", partial(step.reference_pass, rollout))
        rollout = replace(rollout, ref_logprobs=known.logprobs)
        timed(device, seconds, "update", partial(step.update, rollout))
    median = {key: round(statistics.median(values), 3) for key, values in seconds.items()}
    return {"case": name, **median, **rates(step, config, lora, given, median)}


def rates(
    step: Step, config: dict[str, Any], lora: bool, given: argparse.Namespace, median: dict[str, float]
) -> dict[str, Any]:
    head = config["vocab_size"] * config["hidden_size"]
    frozen = (p for n, p in step.policy.named_parameters() if "lora_" not in n)
    trunk = sum(parameter.numel() for parameter in frozen) - head
    new, cells = given.batch * given.new, given.batch * given.new + given.batch // given.k * given.prompt
    work = (4 if lora else 6) * (trunk * cells + head * new)
    found = {
        "parameters": trunk + head,
        "decode_tokens_per_second": round(new / median["sample"]),
        "update_tflops": round(work / median["update"] / 1e12, 2),
    }
    device = torch.cuda.get_device_name() if step.device.type == "cuda" else ""
    peak = next((peak for card, peak in PEAKS.items() if card in device), None)
    if peak is not None:
        width = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2
        read = given.new * 2 * (trunk + head) + new * width * (given.prompt + given.new / 2)
        found["update_mfu"] = round(work / median["update"] / peak[0], 3)
        found["decode_bandwidth"] = round(read / median["sample"] / peak[1], 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=["2b", "2b-lora", "7b-lora"])
    parser.add_argument("--batch", type=int, default=256, help="completions a step")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--new", type=int, default=256, help="completion tokens")
    parser.add_argument("--tokens", type=int, default=16384, help="of a forward")
    parser.add_argument("--kv-gib", type=float, default=24.0)
    parser.add_argument("--activations", choices=["keep", "recompute", "offload"], default="recompute")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and given.only != ["tiny"]:
        parser.error("there is no GPU here; --only tiny runs on a CPU")
    rows = []
    for name in given.only:
        rows.append(measure(name, given, device))
        print(rows[-1], flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if device.type == "cuda":
        settings = {key: value for key, value in vars(given).items() if key != "only"}
        record.write("gpu_step", {"device": torch.cuda.get_device_name(), **settings}, rows)


if __name__ == "__main__":
    main()
