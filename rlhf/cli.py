"""The command line. Everything heavy is imported inside a command, after the recipe has been checked."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rlhf import shipped
from rlhf.errors import ExitCode, UserError
from rlhf.spawn import EXIT_CODE_FILE, spawn
from rlhf.tracking.redact import printable

app = typer.Typer(
    name="rlhf",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-training centred on REINFORCE: one YAML recipe, one word to swap the objective.\n\n"
    "Start with `rlhf quickstart`. Then copy a recipe (`rlhf recipes`), change it, `rlhf check` it, `rlhf train` it.",
    epilog="Exit codes: 0 done, 2 your input (no traceback), 70 diverged, 71 out of memory, 74 disk, "
    "75 reward source gone, 143 preempted after a save, 1 a bug of ours.",
)
app.add_typer(shipped.app, name="recipes")


class Dtype(StrEnum):
    """Arithmetic of a forward."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A file, or a shipped name such as `quickstart/reinforce`.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes, spelled like the YAML: `kl.beta=0.1`, `data.train.0.path=mine.jsonl`, `tracking.to=[]`.",
        show_default=False,
    ),
]


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    accelerate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH",
            help="Start one rank per device by this accelerate configuration: `cpu_2ranks`, `zero3`, or a file.",
        ),
    ] = None,
) -> None:
    """Train a recipe, or go on with a run that was interrupted.

    `rlhf train quickstart/reinforce run.name=no-kl kl.beta=0`

    The recipe is checked first; a finished run of the same recipe says so and is left alone.
    """
    from rlhf.recipe import load_recipe

    changes = overrides or []
    ready = load_recipe(recipe, changes)
    if accelerate is not None:
        from rlhf.locate import accelerate_config_file

        code = spawn(accelerate_config_file(accelerate), ["train", recipe, *changes], ready.output_dir)
        raise typer.Exit(int(code))
    from rlhf.programs import launch

    _leave(launch.train(ready, ["rlhf", *sys.argv[1:]]))


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="Look at this many rows of each source.")] = 10_000,
) -> None:
    """Check a recipe without loading a model: every error at once, by file and line.

    Prints what the run would do, the sections that its objective does not read, and remarks. Then it looks at the data:
    rows used and dropped, the first example token by token, lengths.
    """
    from rlhf.objectives.presets import preset
    from rlhf.recipe import ignored_sections, load_recipe, remarks

    ready = load_recipe(recipe, overrides or [])
    chosen = preset(ready.objective)
    for name, value in _summary(ready):
        typer.echo(f"{name:<11}{value}")
    typer.echo(f"{'formula':<11}{chosen.formula}")
    typer.echo(f"{'needs':<11}{'; '.join(chosen.needs)}")
    if chosen.pins:
        pinned = ", ".join(f"{key}={value}" for key, value in chosen.pins.items())
        typer.echo(f"{'pinned':<11}{pinned} (what {ready.objective} stands for)")
    ignored = ignored_sections(ready)
    if ignored:
        typer.echo(f"{'not read':<11}{', '.join(ignored)} (another objective's; they stay legal)")
    for text in remarks(ready):
        typer.echo(f"{'remark':<11}{text}")
    from rlhf.programs.check import describe_data

    describe_data(ready, rows)
    typer.echo("The recipe is valid.")


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=0, metavar="N", help="GPUs of a machine; 0 = this machine's CPU.")] = 0,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of one GPU, such as `80GiB`; default: the card's.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="M", help="Machines with so many GPUs each.")] = 1,
    accelerate: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_PATH", help="Accelerate configuration; default: the first that fits."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="CARD", help="`h100`, `h200`, `a100`, …: its memory, and times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a recipe needs of memory and time on a machine that need not be here. Reads no weights, no data.

    `rlhf plan hh/reinforce --gpus 8 --gpu h100 --accelerate zero3`

    Per process: what each model holds, the peak of each part of a step, whether it fits, the smallest change that would
    make it fit. Every formula is in docs/planning.md. Exit code 2 where it does not fit.
    """
    from rlhf.locate import recipe_file
    from rlhf.recipe import load_recipe

    ready = load_recipe(recipe, overrides or [], inputs=False)
    from rlhf.programs import plan as program

    options = program.Options(gpus=gpus, memory=gpu_memory, nodes=nodes, accelerate=accelerate, gpu=gpu)
    _leave(program.main(ready, recipe_file(recipe).parent, options, as_json=as_json))


@app.command()
def quickstart(
    overrides: Overrides = None,
    shortened: Annotated[
        bool, typer.Option("--shortened", help="A few steps of each stage: does it work here?")
    ] = False,
) -> None:
    """See the whole thing on this machine: SFT, a reward model, then REINFORCE.

    No download, no account, a few minutes on two cores. Runs lie in `runs/quickstart-*`.
    """
    from rlhf.programs import quickstart as program

    _leave(program.main(shortened, overrides or []))


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL", help="A reward run such as `runs/my-run-reward`, a model folder, a hub id."
        ),
    ],
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROWS", help="File, folder, hub id or `package.module:function`; default: the run's `data.eval`."
        ),
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Accuracy for each value of this column of the rows too.")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the figures go as JSON.")] = None,
) -> None:
    """Measure a reward model on held-out preference rows: accuracy, calibration, and what length alone would reach.

    `rlhf evaluate runs/reviews-reward --data test.jsonl --by source`

    Rows are `chosen` + `rejected` (+ `prompt`), or `text` + `label`, read as in training. Rows with `subset`
    (RewardBench) are shown by subset and by section; `data.eval.0.format=chat` takes string prompts as user turns. Keys
    that are read: `data.eval`, `data.system_role`, `batch.microbatch_tokens`, `policy.compute_dtype`.

    Writes `evaluation.json` into the run directory, into a bare model folder, or here for a hub id.
    """
    from rlhf.programs import evaluate as program

    _leave(program.main(model, overrides or [], data=data or [], by=by or [], output=output))


@app.command()
def merge(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders such as `runs/my-run-reward/final`.")
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the new model goes.")],
    weight: Annotated[
        list[float] | None,
        typer.Option(metavar="W", help="Of each model, in their order; default: all alike.", show_default=False),
    ] = None,
    slerp: Annotated[
        float | None,
        typer.Option(metavar="T", min=0, max=1, help="Between two models along an arc around `--base`: 0 = the first."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What both were trained from; for `--slerp`.")
    ] = None,
) -> None:
    """Average models that were trained from one start, or add an adapter to its base.

    `rlhf merge runs/a-reward/final runs/b-reward/final --output rewards-merged`

    The mean of reward models withstands exploitation better than each (WARM); that of policies keeps what they have in
    common (WARP: `--slerp 0.5 --base runs/my-sft/final`). One folder with an adapter becomes a whole model.
    """
    from rlhf.programs import merge as program

    _leave(program.main(models, output, weights=weight or [], base=base, slerp=slerp))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, such as `runs/my-run-reinforce`.")
    ],
) -> None:
    """Write `report.html` of one run, or of several side by side: curves and samples in one file."""
    from rlhf.programs import report as program

    _leave(program.main(runs))


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as `runs/my-run-reinforce`.")],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be given again.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts as rows of a .jsonl file.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="How many of the run's own held-out prompts.")] = 4,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Completions of each prompt.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", min=0, help="0 = always the most likely token.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Longest completion.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", min=0, help="Of the noise.", show_default=False)] = None,
    side_by_side: Annotated[
        bool | None,
        typer.Option("--side-by-side/--alone", help="Beside the model that the run started from.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Read what a run writes: its completions, beside those of the model it started from.

    `rlhf sample runs/quickstart-reinforce --prompt "Help me thank my aunt."`

    Both draw with the same noise, so they differ only where the policy changed. What is not given is as in the run's
    recipe; without prompts, the first held-out ones are taken. The scores are those of the run's reward.
    """
    from rlhf.programs.run_folder import Request, open_folder

    request = Request(
        prompts=tuple(prompt or ()),
        file=file,
        rows=rows,
        count=count,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        side_by_side=side_by_side,
    )
    folder = open_folder(run)
    request.check(folder)
    from rlhf.programs import sample as program
    from rlhf.programs import sample_show

    found = program.samples(folder, request, lambda text: typer.echo(printable(text), err=as_json))
    names = folder.path.resolve().name, folder.recipe.policy.path
    if as_json:
        for line in sample_show.json_lines(found, *names):
            typer.echo(line)
    else:
        sample_show.show(found, *names)


@app.command(context_settings={"ignore_unknown_options": True})
def serve_policy(
    recipe: RecipeName,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(metavar="HOST", help="Where it listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=1, max=65535)] = 8000,
) -> None:
    """Start a vLLM server that decodes for `rlhf train` of the same recipe.

    `rlhf serve-policy my-recipe.yaml`, and elsewhere
    `rlhf train my-recipe.yaml rollout.engine=vllm rollout.url=http://127.0.0.1:8000`

    It starts without weights; the trainer pushes them before every rollout, through files in `rollout.push_folder`.
    Options of `vllm serve` may follow the overrides: `rlhf serve-policy my-recipe.yaml --tensor-parallel-size 4`.

    Whoever can reach the port can replace the weights: `rollout.token_env` guards completions alone, so leave it on
    this machine or inside a network of your own.
    """
    from importlib.util import find_spec

    from rlhf.recipe import load_recipe

    given = overrides or []
    first = next((place for place, text in enumerate(given) if text.startswith("-")), len(given))
    ready = load_recipe(recipe, [*given[:first], "rollout.engine=hf", "rollout.url=null", "rollout.ahead=false"])
    if find_spec("vllm") is None:
        raise UserError("vllm is not installed here, and it is what serves; `pip install 'rlhf[vllm]'`")
    from rlhf.programs.serve_policy import serve

    raise typer.Exit(serve(ready, host, port, given[first:]))


@app.command(name="serve-reward")
def serve_reward(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A reward run such as `runs/my-run-reward`, a model folder, a hub id."),
    ],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Who can ask; 0.0.0.0 = every machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0 = a free one, which is printed.")] = 8100,
    token_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable that holds the bearer token.", show_default=False),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of one forward.")] = 16384,
    dtype: Annotated[Dtype, typer.Option(help="Arithmetic; auto: bf16 where the hardware has it.")] = Dtype.auto,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic/--batched", help="A request has forwards of its own, or shares them with others that wait."
        ),
    ] = True,
    max_texts: Annotated[int, typer.Option(min=1, metavar="N", help="Texts of one request.")] = 1024,
    max_body_mib: Annotated[int, typer.Option(min=1, metavar="N", help="Size of one request (MiB).")] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=1, metavar="N", help="Requests that wait; one more is told to come back (503).")
    ] = 64,
) -> None:
    """Serve a reward model over HTTP, so that runs elsewhere can use it: `reward.models.0.url=http://host:8100`.

    `rlhf serve-reward runs/quickstart-reward`

    Only this machine reaches it unless `--host` says otherwise; then a token is asked for:

    `RLHF_REWARD_TOKEN=… rlhf serve-reward my-org/rm --host 0.0.0.0 --token-env RLHF_REWARD_TOKEN`

    With `--deterministic` a score is the same to the last bit whoever else asks. `--batched` is faster for many small
    requests, and scores then differ in their last digits. Several servers of one model share the work of a run that
    names them all. SIGTERM ends it after the requests that it has accepted. More: docs/reward_server.md.
    """
    from rlhf.programs import serve_reward as program

    options = program.Options(
        host=host,
        port=port,
        token_env=token_env,
        batch_tokens=batch_tokens,
        dtype=dtype.value,
        deterministic=deterministic,
        max_texts=max_texts,
        max_body_mib=max_body_mib,
        max_waiting=max_waiting,
    )
    _leave(program.main(model, options))


@app.command()
def env() -> None:
    """Print what a bug report needs: versions, devices, launch environment."""
    for package in ("rlhf", "torch", "transformers", "accelerate", "deepspeed", "datasets", "peft", "wandb", "vllm"):
        typer.echo(f"{package:<14}{_version(package)}")
    typer.echo(f"{'python':<14}{sys.version.split()[0]} on {sys.platform}, {os.cpu_count()} cores")
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    typer.echo(f"{'devices':<14}{', '.join(names) or 'cpu'}")
    shown = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "WANDB_MODE")
    for name in shown:
        if name in os.environ:
            typer.echo(f"{name:<17}{os.environ[name]}")


def main() -> None:
    """Entry point of ``rlhf``: a UserError ends the process with its message and its code, without a traceback."""
    try:
        app()
    except UserError as error:
        if _first_rank():  # every rank reads the same recipe; one of them says so
            print(error, file=sys.stderr)
        _tell_spawner(error.code)
        sys.exit(int(error.code))


def _leave(code: ExitCode) -> NoReturn:
    _tell_spawner(code)
    raise typer.Exit(int(code))


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _tell_spawner(code: ExitCode) -> None:
    """accelerate turns every code into 1, so the first rank leaves its own where ``rlhf train --accelerate`` looks."""
    file = os.environ.get(EXIT_CODE_FILE)
    if file and _first_rank():
        Path(file).write_text(str(int(code)), encoding="utf-8")


def _summary(recipe: object) -> list[tuple[str, object]]:
    from rlhf.recipe import Recipe

    assert isinstance(recipe, Recipe)
    scratch = recipe.policy.scratch
    policy = recipe.policy.path or (scratch and f"{scratch.family} from scratch, {scratch.layers} layers")
    steps = f"{recipe.run.steps} steps" if recipe.run.steps else "steps by the data"
    rows = ", ".join(source.path for source in recipe.data.train)
    return [
        ("objective", recipe.objective),
        ("run", f"{recipe.output_dir} ({steps}, seed {recipe.run.seed})"),
        ("policy", policy),
        ("data", rows),
    ]


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
