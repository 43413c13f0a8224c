"""Broken recipes, each with the key its message is filed under and words that the message must hold."""

from __future__ import annotations

from dataclasses import dataclass

# A valid recipe, one section a line, so that one line can be swapped for a broken one.
SECTIONS = {
    "objective": "objective: reinforce",
    "run": "run: {name: x, steps: 3}",
    "policy": "policy: {path: model}",
    "reward": 'reward: {functions: [{call: "json:loads"}]}',
    "data": "data: {train: [{path: rows.jsonl}]}",
}
# fmt: off
OTHER_SECTIONS = (
    "reference", "value", "rollout", "kl", "instruction", "reinforce", "ppo", "dpo", "sft", "reward_model", "optim",
    "batch", "eval", "checkpoint", "tracking",
)
# fmt: on


def recipe(**changed: str | None) -> str:
    """The valid recipe with lines replaced, added, or left out (None)."""
    lines = {**SECTIONS, **changed}
    return "\n".join(line for line in lines.values() if line is not None) + "\n"


@dataclass(frozen=True)
class Broken:
    """``says``: words of the message. ``line``: where the first message points, 0 = nowhere in particular."""

    text: str | bytes
    says: tuple[str, ...]
    line: int = 0


def served(url: str, *more: str) -> str:
    """With a reward server, and further keys of its entry."""
    entry = ", ".join([f"url: '{url}'", *more])
    return recipe(reward=f"reward: {{models: [{{{entry}}}]}}")


def decoder(url: str) -> str:
    """With completions by a server."""
    return recipe(rollout=f'rollout: {{engine: vllm, url: "{url}"}}')


TOKEN = "hf_" + "aB3" * 10
BOMB = "a: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8)
)


def b(text: str | bytes, *says: str, line: int = 0) -> Broken:
    return Broken(text, says, line)


def lr(value: str) -> str:
    return recipe(optim=f"optim: {{lr: {value}}}")


def k(value: str) -> str:
    return recipe(rollout=f"rollout: {{samples_per_prompt: {value}}}")


def run(inner: str) -> str:
    return recipe(run=f"run: {{name: x, steps: 3, {inner}}}")


TYPES: dict[str, Broken] = {
    "text for a number": b(lr("fast"), "optim.lr: must be a number, not 'fast'", line=6),
    "quoted number": b(lr("'1e-5'"), "optim.lr: must be a number", "take the quotes away", line=6),
    "octal": b(k("010"), "rollout.samples_per_prompt: '010' is octal to some", line=6),
    "octal of YAML 1.2": b(k("0o17"), "samples_per_prompt: '0o17' is octal", line=6),
    "base 60": b(k("1:30"), "samples_per_prompt: '1:30' is a base-60 number", line=6),
    "underscore": b(k("1_000"), "samples_per_prompt: '1_000' is a number to some", line=6),
    "no as a name": b(recipe(run="run: {name: no}"), "run.name: 'no' is a truth value", "in quotes", line=2),
    "on as a word": b(recipe(data="data: {train: [{path: rows.jsonl}], system_role: on}"), "data.system_role: 'on'"),
    "date as a name": b(recipe(run="run: {name: 2026-01-02}"), "run.name: '2026-01-02' is a date", line=2),
    "yes for true": b(recipe(sft="sft: {packing: yes}"), "sft.packing: 'yes' is a truth value", "true or false"),
    "infinity": b(lr(".inf"), "optim.lr: must be a finite number", line=6),
    "not a number": b(lr(".nan"), "optim.lr: must be a finite number, not nan", line=6),
    "null for required": b(recipe(run="run: {name: null}"), "run.name: must be text, not null", line=2),
    "list for a scalar": b(k("[1, 2]"), "samples_per_prompt: must be a whole number, not a list of 2", line=6),
    "scalar for a list": b(recipe(tracking="tracking: {to: wandb}"), "tracking.to: must be a list", line=6),
    "section for a list": b(recipe(data="data: {train: {path: rows.jsonl}}"), "data.train: must be a list", line=5),
    "list for a section": b(recipe(kl="kl: [0.1]"), "kl: must be a section of `key: value` lines, not a list", line=6),
    "scalar for a section": b(recipe(kl="kl: 0.1"), "kl: must be a section", line=6),
    "empty section": b(recipe(kl="kl:"), "kl: must be a section", "null", line=6),
    "float for a count": b(k("4.0"), "samples_per_prompt: must be a whole number, not 4.0", line=6),
    "true for a number": b(k("true"), "samples_per_prompt: must be a whole number, not true", line=6),
    "zero": b(k("0"), "samples_per_prompt: should be greater than or equal to 1, not 0", line=6),
    "negative batch": b(recipe(batch="batch: {prompts_per_step: -8}"), "batch.prompts_per_step: should be greater"),
    "lr 0": b(lr("0"), "optim.lr: should be greater than 0, not 0", line=6),
    "KL below 0": b(recipe(kl="kl: {beta: -0.1}"), "kl.beta: should be greater than or equal to 0", line=6),
    "clip of 1": b(recipe(ppo="ppo: {clip: 1.0}"), "ppo.clip: should be less than 1", line=6),
    "keep 0": b(recipe(checkpoint="checkpoint: {keep: 0}"), "checkpoint.keep: should be greater", line=6),
    "float steps": b(recipe(run="run: {name: x, steps: 1e3}"), "run.steps: must be a whole number, not 1000.0", line=2),
    "huge integer": b(run("seed: " + "9" * 400), "run.seed:", "a huge number", line=2),
    "number as a name": b(recipe(run="run: {name: 7}"), "run.name: must be text, not 7; put it in quotes", line=2),
    "wrong choice": b(recipe(kl="kl: {estimator: exakt}"), "kl.estimator: must be k1 | exact", "did you mean exact?"),
    "tag": b(recipe(kl="kl: {beta: !!float 1}"), "kl.beta: the tag !!float is not used", line=6),
    "python tag": b(recipe(kl="kl: !!python/object/apply:os.abort []"), "kl: the tag !!python/object/apply", line=6),
}

STRUCTURE: dict[str, Broken] = {
    "empty": b("", "is empty", line=1),
    "only comments": b("# nothing\n", "is empty", line=1),
    "list at the top": b("- objective: sft\n", "is a list at the top", line=1),
    "word at the top": b("reinforce\n", "is a single value at the top", line=1),
    "duplicate key": b(recipe() + "kl: {beta: 0.1}\nkl: {beta: 0.2}\n", "kl: duplicate key", "line 6", line=7),
    "duplicate inner key": b(recipe(kl="kl: {beta: 1, beta: 2}"), "kl.beta: duplicate key", line=6),
    "unknown key": b(recipe(kl="kl: {betta: 0.1}"), "kl.betta: unknown key 'betta'; did you mean beta?", line=6),
    "unknown section": b(recipe(kl="kll: {beta: 0.1}"), "kll: unknown key 'kll'; did you mean kl?", line=6),
    "key of another section": b(recipe(run="run: {name: x, beta: 1}"), "run.beta: unknown key", "belongs under kl:"),
    "key at the top": b(recipe(x="samples_per_prompt: 4"), "it belongs under rollout:", line=6),
    "somebody else's key": b(recipe(x="learning_rate: 1e-5"), "here it is called optim.lr", line=6),
    "key of a list entry": b(
        recipe(data="data: {train: [{path: rows.jsonl, splt: a}]}"), "data.train.0.splt", "split?"
    ),
    "truncated sampling": b(
        recipe(x="rollout: {top_p: 0.9}"), "rollout.top_p: there is no top_p", "whole distribution"
    ),
    "tab": b("objective: sft\nrun:\n\tname: x\n", "tab", "spaces", line=3),
    "unclosed brace": b("objective: sft\nrun: {name: x\n", "not YAML", line=3),
    "unclosed quote": b("objective: sft\nrun: {name: 'x}\n", "not YAML", line=3),
    "missing space": b("objective:sft\nrun: {name: x}\n", "not YAML", line=2),
    "two documents": b(recipe() + "---\n" + recipe(), "a second document", line=6),
    "unknown alias": b(recipe(kl="kl: *none"), "undefined alias", line=6),
    "alias cycle": b("run: &a\n  name: *a\n", "an alias contains itself", line=1),
    "alias bomb": b(BOMB, "aliases expand to more than 10,000 values"),
    "merge key": b(recipe(kl="kl: {<<: {beta: 1}}"), "merge keys", line=6),
    "deep nesting": b("a: " + "[" * 1000, "levels deep", line=1),
    "too many values": b("a: [" + "1," * 20_000 + "]", "more than 10,000 values"),
    "long key": b(recipe(x="x" * 5000 + ": 1"), "key", line=6),
    "over 1 MB": b("a: " + "x" * 1_100_000, "larger than 1,000,000 bytes"),
    "not UTF-8": b(b"objective: sft\nrun: {name: \xff}\n", "is not UTF-8", line=2),
    "UTF-16": b("objective: sft\n".encode("utf-16"), "is not UTF-8", line=1),
    "NUL": b("objective: s\0ft\n", "not allowed in YAML", line=1),
    "binary": b(bytes(range(32, 256)), "is not UTF-8", line=1),
    "key that is a list": b(recipe(x="[a]: 1"), "a key must be a plain word", line=6),
}

MEANING: dict[str, Broken] = {
    "no objective": b(recipe(objective=None), "objective: is required", line=1),
    "no run": b(recipe(run=None), "run: is required"),
    "no name": b(recipe(run="run: {steps: 3}"), "run.name: is required", line=2),
    "misspelt objective": b(recipe(objective="objective: reinforse"), "did you mean reinforce?", line=1),
    "objective of a later version": b(recipe(objective="objective: kto"), "kto is not in this version", line=1),
    "objective that is not there": b(recipe(objective='objective: "nowhere:Thing"'), "no module nowhere", line=1),
    "group of one": b(k("1"), "leave_one_out is made of the prompt's other completions", line=6),
    "shrinkage of one": b(k("1") + "reinforce: {baseline: shrinkage}\n", "baseline shrinkage is made of", line=6),
    "no reward": b(recipe(reward=None), "reward: there is no reward; reinforce needs"),
    "reward of weight 0": b(
        recipe(reward='reward: {functions: [{call: "json:loads", weight: 0}]}'), "every source has weight 0", line=4
    ),
    "weights that cancel": b(
        recipe(reward="reward: {models: [{path: model}, {path: model, weight: -1}]}"), "add up to 0", line=4
    ),
    "value baseline": b(recipe(reinforce="reinforce: {baseline: value}"), "value needs a critic", line=6),
    "mean of one": b(
        k("1") + "batch: {prompts_per_step: 1}\nreinforce: {baseline: batch_mean}\n", "every advantage is 0", line=8
    ),
    "natural gradients in 8 bits": b(
        recipe(objective="objective: trpo", policy="policy: {path: model, compute_dtype: bfloat16}"),
        "trpo takes differences of gradients",
        line=3,
    ),
    "trpo in several steps": b(
        recipe(objective="objective: trpo", reinforce="reinforce: {updates_per_rollout: 2}"), "one step a rollout"
    ),
    "trpo and instruction rows": b(
        recipe(
            objective="objective: trpo",
            data="data: {train: [{path: rows.jsonl}], instruction: [{path: rows.jsonl}]}",
            instruction="instruction: {coefficient: 0.1}",
        ),
        "directions that the rollout does not see",
    ),
    "a shared critic that learns alone": b(
        recipe(objective="objective: ppo", value="value: {shared: true, warmup_steps: 2}"), "trains the policy's trunk"
    ),
    "a critic that learns alone for ever": b(
        recipe(objective="objective: ppo", run="run: {name: x, steps: 2}", value="value: {warmup_steps: 2}"),
        "the policy would never be trained",
    ),
    "an adapter on another base": b(
        recipe(policy="policy: {path: model, lora: {}}", reference="reference: {path: model, ema: 0.9}"), "another base"
    ),
    "two limits of a step": b(
        recipe(objective="objective: trpo", optim="optim: {kl_step_limit: 0.1}"), "limited by trpo.max_kl", line=6
    ),
    "KL of a reward model": b(
        recipe(objective="objective: reward", optim="optim: {kl_step_limit: 0.1}"), "no distribution over tokens"
    ),
    "more parts than prompts": b(
        recipe(objective="objective: ppo", ppo="ppo: {minibatches: 4096}"), "ppo.minibatches: 4096 parts of", line=6
    ),
    "a spread for every token": b(
        recipe(reinforce="reinforce: {baseline: optimal_token, divide_by: group_std}"), "another baseline", line=6
    ),
    "best of one": b(k("1").replace("objective: reinforce", "objective: raft"), "every completion the best", line=6),
    "adaptive KL": b(recipe(kl="kl: {target: 6.0}"), "kl.target: adapting beta to a target is ppo's", line=6),
    "instruction without rows": b(
        recipe(instruction="instruction: {coefficient: 0.1}"), "add data.instruction", line=6
    ),
    "prompts cut from chats": b(
        recipe(data="data: {train: [{path: rows.jsonl, format: messages}], prompt_tokens: 4}"), "plain text", line=5
    ),
    "path and scratch": b(recipe(policy="policy: {path: model, scratch: {}}"), "both policy.path and policy.scratch"),
    "neither path nor scratch": b(recipe(policy=None), "neither policy.path nor policy.scratch"),
    "tokenizer beside a model": b(recipe(policy="policy: {path: model, tokenizer: model}"), "only for policy.scratch"),
    "odd heads": b(recipe(policy="policy: {scratch: {hidden_size: 100, heads: 8}}"), "multiple of 16", line=3),
    "adapters on nothing": b(recipe(policy="policy: {scratch: {}, lora: {}}"), "random frozen weights", line=3),
    "reward path and url": b(
        recipe(reward="reward: {models: [{path: model, url: 'http://h:1'}]}"), "both path and url", line=4
    ),
    "reward neither path nor url": b(recipe(reward="reward: {models: [{weight: 1}]}"), "neither path nor url", line=4),
    "no server's address": b(served("localhost:8100"), "'localhost:8100' is no address of a server", line=4),
    "another protocol": b(served("file:///etc/passwd"), "is no address of a server", line=4),
    "no port": b(served("http://h:99999"), "'http://h:99999' is no address", line=4),
    "where clouds keep secrets": b(served("http://169.254.169.254/x"), "is link-local", line=4),
    "a question behind the path": b(served("http://h:1/?a=b"), "has something behind its path", line=4),
    "the same server twice": b(served("http://h:1,http://h:1/"), "names a server twice", line=4),
    "a list without servers": b(served(" , "), "names no server", line=4),
    "one bad server of two": b(served("http://h:1, h:2"), "'h:2' is no address of a server", line=4),
    "forwards of a server": b(served("http://h:1", "microbatch_tokens: 8"), "a server cuts its own forwards", line=4),
    "place of a server": b(
        served("http://h:1", "placement: replicate"), "a server's weights lie where it runs", line=4
    ),
    "no token": b(served("http://h:1", "token_env: NOT_SET_ANYWHERE"), "NOT_SET_ANYWHERE is not set", line=4),
    "token instead of its name": b(served("http://h:1", "token_env: a-b"), "Name of the environment variable", line=4),
    "no server to give up": b(
        recipe(reward="reward: {models: [{path: model, give_up_seconds: 5}]}"),
        "only a server (`url:`) is asked",
        line=4,
    ),
    "ids for a folder": b(
        recipe(reward="reward: {models: [{path: model, send: ids}]}"), "only a server (`url:`) is asked", line=4
    ),
    "something else for a server": b(served("http://h:1", "send: words"), "send: must be text | ids", line=4),
    "endless patience": b(served("http://h:1", "give_up_seconds: 9000"), "less than or equal to 1100", line=4),
    "judge path and url": b(
        recipe(eval="eval: {models: [{path: model, url: 'http://h:1'}]}"), "eval.models.0: both path and url", line=6
    ),
    "judge without a path": b(recipe(eval="eval: {models: [{}]}"), "eval.models.0: neither path nor url", line=6),
    "a placement that is none": b(
        recipe(reward="reward: {models: [{path: model, placement: quantized}]}"),
        "auto | replicate | zero3 | offload",
        line=4,
    ),
    "a base without an adapter": b(
        recipe(reward="reward: {models: [{path: model, placement: policy_base}]}"),
        "without policy.lora the policy trains its base away",
        "no adapter in 'model/adapter'",
        line=4,
    ),
    "a reward model without an adapter": b(
        recipe(
            policy="policy: {path: model, lora: {}}",
            reward="reward: {models: [{path: model, placement: policy_base}]}",
        ),
        "no adapter in 'model/adapter'",
        line=4,
    ),
    "a base of a policy from scratch": b(
        recipe(
            policy="policy: {scratch: {}, lora: {}}", reward="reward: {models: [{path: model, placement: policy_base}]}"
        ),
        "a policy from scratch has a base of its own",
        line=4,
    ),
    "a quantized base": b(
        recipe(
            policy="policy: {path: model, lora: {}, quantize: 4bit}",
            reward="reward: {models: [{path: model, placement: policy_base}]}",
        ),
        "the adapter was trained on whole weights",
        line=4,
    ),
    "a base for judging pairs": b(
        recipe(
            objective="objective: dpo",
            policy="policy: {path: model, lora: {}}",
            reward="reward: {models: [{path: model, placement: policy_base}]}",
        ),
        "dpo scores only held-out completions",
        line=4,
    ),
    "a server on the policy's base": b(
        served("http://h:1", "placement: policy_base"), "a server's weights lie where it runs", line=4
    ),
    "quantized weights in shares": b(
        recipe(reward="reward: {models: [{path: model, placement: zero3, quantize: 8bit}]}"),
        "quantized weights stay where they are",
        line=4,
    ),
    "quantizing a server's model": b(
        served("http://h:1", "quantize: 8bit"), "a server's weights are as it loaded them", line=4
    ),
    "quantized to nothing": b(
        recipe(reward="reward: {models: [{path: model, quantize: 2bit}]}"), "4bit | 8bit", line=4
    ),
    "training quantized weights": b(recipe(policy="policy: {path: model, quantize: 4bit}"), "add policy.lora", line=3),
    "a policy of 8 bits": b(recipe(policy="policy: {path: model, lora: {}, quantize: 8bit}"), "must be 4bit", line=3),
    "a quantized reward model in training": b(
        recipe(objective="objective: reward", policy="policy: {path: model, lora: {}, quantize: 4bit}", reward=None),
        "a reward model is saved whole",
        line=3,
    ),
    "quantized weights pushed": b(
        recipe(
            policy="policy: {path: model, lora: {}, quantize: 4bit}",
            rollout="rollout: {engine: vllm, url: 'http://127.0.0.1:8000'}",
        ),
        "vLLM is given whole weights",
        line=3,
    ),
    "a moving reference of quantized weights": b(
        recipe(policy="policy: {path: model, lora: {}, quantize: 4bit}", reference="reference: {ema: 0.9}"),
        "a reference that moves is a copy",
        line=3,
    ),
    "a quantized reference that is the policy": b(
        recipe(policy="policy: {path: model, lora: {}}", reference="reference: {quantize: 8bit}"),
        "set policy.quantize=4bit instead",
        line=6,
    ),
    "a quantized reference from nowhere": b(
        recipe(policy="policy: {scratch: {}}", reference="reference: {quantize: 8bit}"), "has no folder", line=6
    ),
    "a quantized reference that moves": b(
        recipe(reference="reference: {quantize: 8bit, reset_steps: 5}"), "a reference that moves has whole", line=6
    ),
    "a quantized reference in shares": b(
        recipe(reference="reference: {quantize: 4bit, placement: offload}"), "stay where they are", line=6
    ),
    "a reference in shares that moves": b(
        recipe(reference="reference: {ema: 0.9, placement: zero3}"), "a reference that moves", line=6
    ),
    "a reference in shares read by the update": b(
        recipe(reference="reference: {placement: zero3}", kl="kl: {estimator: exact}"),
        "the exact KL reads the reference in the update too",
        line=6,
    ),
    "a reference of pairs in shares": b(
        recipe(objective="objective: dpo", reference="reference: {placement: zero3}"), "are kept by the weights", line=6
    ),
    "moving reference of pairs": b(
        recipe(objective="objective: dpo", reference="reference: {ema: 0.99}"), "reference, which stands still", line=6
    ),
    "a server of another engine": b(
        recipe(rollout="rollout: {url: 'http://127.0.0.1:8000'}"), "a server decodes for engine=vllm alone", line=6
    ),
    "a server's token that nobody set": b(
        recipe(rollout="rollout: {engine: vllm, url: 'http://127.0.0.1:8000', token_env: NOT_SET_ANYWHERE}"),
        "NOT_SET_ANYWHERE is not set",
        line=6,
    ),
    "a password in the address of the decoder": b(decoder("http://u:p@h"), "put it into an environment", line=6),
    "a decoder's port in words": b(decoder("http://h:abc"), "'http://h:abc' is no address", line=6),
    "a decoder without a protocol": b(decoder("127.0.0.1:8000"), "is no address of a server", line=6),
    "a decoder's control character": b(decoder("http://h\\x01"), "is no address of a server", line=6),
    "a decoder at no IP address": b(decoder("http://256.1.1.1:8000"), "form of an IP address and is none", line=6),
    "two decoders": b(decoder("http://h:1,http://h:2"), "weights are pushed to one", line=6),
    "layers for vllm": b(
        recipe(rollout="rollout: {engine: vllm, url: 'http://127.0.0.1:8000', gather: layers}"), "pushed to it whole"
    ),
    "a step ahead of itself": b(recipe(rollout="rollout: {ahead: true}"), "nothing decodes beside the trainer", line=6),
    "a trust region around another policy": b(
        recipe(
            objective="objective: trpo", rollout="rollout: {engine: vllm, url: 'http://127.0.0.1:8000', ahead: true}"
        ),
        "one around the policy that sampled",
    ),
    "other engine": b(recipe(rollout="rollout: {engine: vllm}"), "rollout.engine: vllm is not installed", line=6),
    "pushing": b(recipe(checkpoint="checkpoint: {hub_id: a/b}"), "pushing is not in this version", line=6),
    "no rows": b(recipe(data="data: {train: []}"), "no rows to train on", line=5),
    "missing file": b(recipe(data="data: {train: [{path: rovs.jsonl}]}"), "did you mean rows.jsonl?", line=5),
    "missing folder": b(recipe(data="data: {train: [{path: /no/such/a.jsonl}]}"), "nor does the folder", line=5),
    "missing file of another kind": b(recipe(data="data: {train: [{path: rows.csv.gz}]}"), "does not exist", line=5),
    "format that is not known": b(
        recipe(data="data: {train: [{path: rows.jsonl, format: sharegtp}]}"), "did you mean sharegpt?", line=5
    ),
    "format that is not there": b(
        recipe(data='data: {train: [{path: rows.jsonl, format: "nowhere:Rows"}]}'), "no module nowhere", line=5
    ),
    "file of another kind": b(recipe(data="data: {train: [{path: ./model/config.yaml}]}"), "does not exist", line=5),
    "path that is nothing": b(recipe(data='data: {train: [{path: "a b?"}]}'), "is no file, hub id", line=5),
    "function that is not there": b(recipe(data='data: {train: [{path: "nowhere:rows"}]}'), "no module nowhere"),
    "not a model folder": b(recipe(policy="policy: {path: ./}"), "holds no config.json", line=3),
    "missing template": b(recipe(policy="policy: {path: model, chat_template: my.jinja}"), "no file 'my.jinja'"),
    "output of another recipe": b(
        recipe(policy="policy: {path: runs/quickstart-sft/final}"), "does not exist yet; `rlhf train", "quickstart/sft"
    ),
    "context too short": b(recipe(policy="policy: {path: small}"), "longer than the 32 positions", line=1),
    "slash in the name": b(recipe(run="run: {name: a/b}"), "run.name: 'a/b' does not fit", line=2),
    "way out in the name": b(recipe(run="run: {name: ..}"), "means a folder, not a name", line=2),
    "long name": b(recipe(run=f"run: {{name: {'x' * 65}}}"), "run.name:", "at most 64", line=2),
    "empty output": b(run("output_dir: ''"), "run.output_dir: is empty", line=2),
    "output is here": b(run("output_dir: ."), "holds the working or home directory", line=2),
    "output is above": b(run("output_dir: .."), "holds the working or home directory", line=2),
    "output is the root": b(run("output_dir: /"), "holds the working or home directory", line=2),
    "output is a repository": b(run("output_dir: repo"), "root of a repository", line=2),
    "output is a file": b(run("output_dir: rows.jsonl"), "is, or lies under, a file", line=2),
    "output inside the input": b(run("output_dir: model/out"), "lies in policy.path", line=2),
    "output around the input": b(
        recipe(run="run: {name: x, output_dir: other}", policy="policy: {path: other/final}"), "holds policy.path"
    ),
    "unknown placeholder": b(run("output_dir: 'runs/{seed}'"), "'{seed}' is no placeholder", line=2),
    "variable": b(recipe(policy="policy: {path: $HOME/model}"), "variables are not expanded", line=3),
    "variable in braces": b(run('output_dir: "${OUT}/x"'), "run.output_dir", line=2),
    "token": b(recipe(policy=f"policy: {{path: model, token: {TOKEN}}}"), "looks like an access token", line=3),
    "token in a name": b(recipe(run=f"run: {{name: {TOKEN}}}"), "run.name: looks like an access token", line=2),
    "OpenAI key": b(recipe(reward=f"reward: {{key: sk-{'a1' * 12}}}"), "looks like an access token", line=4),
    "wandb key": b(recipe(tracking=f"tracking: {{api_key: {'0a' * 20}}}"), "looks like an access token", line=6),
    "password in a url": b(
        recipe(reward="reward: {models: [{url: 'http://me:secret@h:1'}]}"), "looks like an access token", line=4
    ),
}

CORPUS: dict[str, Broken] = {**TYPES, **STRUCTURE, **MEANING}

VALID: dict[str, str] = {
    "the plain one": recipe(),
    "a reward server": served("http://127.0.0.1:8100", "weight: 2"),
    "several of one model": served("http://one:8100, https://two.example/rm/", "give_up_seconds: 60"),
    "a server that is sent ids": served("http://127.0.0.1:8100", "send: ids"),
    "a server as a judge": recipe(eval="eval: {models: [{url: 'http://localhost:1'}]}"),
    "1e-6 is a number": lr("1e-6"),
    "an integer is a number": lr("1"),
    "a leading point": lr(".5"),
    "hexadecimal": run("seed: 0xff"),
    "quoted no": recipe(run="run: {name: 'no'}"),
    "quoted date": recipe(run='run: {name: "2026-01-02"}'),
    "byte order mark": "\ufeff" + recipe(),
    "carriage returns": recipe().replace("\n", "\r\n"),
    "one document with a start": "---\n" + recipe(),
    "comments and non-ASCII": "# Überschrift\n" + recipe(),
    "an alias": recipe(data="data: {train: &rows [{path: rows.jsonl}], eval: *rows}"),
    "every section": recipe(**{name: f"{name}: {{}}" for name in OTHER_SECTIONS}),
    "sections of other objectives": recipe(
        objective="objective: sft",
        rollout="rollout: {engine: vllm, samples_per_prompt: 1}",
        reference="reference: {ema: 0.9}",
        kl="kl: {target: 6.0}",
    ),
    "no baseline, one sample": k("1") + "reinforce: {baseline: none}\n",
    "moving average, one sample": k("1") + "reinforce: {baseline: moving_average}\n",
    "hub ids": recipe(policy="policy: {path: google/gemma-7b-it}", data="data: {train: [{path: Anthropic/hh-rlhf}]}"),
    "code for rows": recipe(data='data: {train: [{path: "rlhf.data.quickstart:preferences"}]}'),
    "an outside objective": recipe(objective='objective: "json.decoder:JSONDecoder"', reward=None),
    "from scratch": recipe(policy="policy: {scratch: {family: gemma3, hidden_size: 64, heads: 2}, tokenizer: model}"),
    "adapters": recipe(policy="policy: {path: model, lora: {r: 8, targets: [q_proj]}}"),
    "exact KL": recipe(kl="kl: {estimator: exact, loss_beta: 0.1, loss_estimator: exact_local}"),
    "code for a format": recipe(data='data: {train: [{path: rows.jsonl, format: "json:loads"}], prompt_tokens: 4}'),
    "instruction rows": recipe(
        data="data: {train: [{path: rows.jsonl}], instruction: [{path: rows.jsonl}]}",
        instruction="instruction: {coefficient: 0.1}",
    ),
    "some pairs, no margins": recipe(
        objective="objective: reward", reward_model="reward_model: {pairs_per_prompt: 2, margin: none}", reward=None
    ),
    "an ensemble": recipe(reward="reward: {combine: min, models: [{path: model}, {path: model, weight: 2}]}"),
    "an absolute output": run("output_dir: '/tmp/rlhf-corpus/{name}'"),
    "40 hexadecimal digits that are no key": recipe(run=f"run: {{name: {'ab' * 20}}}"),
}
