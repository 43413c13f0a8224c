"""A reward model as a source of scores. Text is the interface: it has its own tokenizer and its own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.interfaces import Alone, Collective
from rlhf.models import masks, quantized
from rlhf.models.chat import drawn_completion, render_completion, render_prompt, special_ids
from rlhf.models.layout import Size, plain_rows
from rlhf.models.prefixes import share_prefixes, shared_length
from rlhf.models.quantized import Quantization
from rlhf.models.scalar import ScalarModel
from rlhf.rewards import canary
from rlhf.rollout import Prompt, Rollout, pad_rows
from rlhf.runtime.microbatches import pack
from rlhf.runtime.placement import Placed, Placement, place

LONGEST_SHARED = 4096  # tokens of a row: its mask is quadratic
_ALONE = Alone()


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A transformers sequence classifier with one label.

    tokenizer: the reward model's own. compute_dtype: autocast type of the forward. microbatch_tokens: rows × padded
    width of one forward. A row of more than ``max_tokens`` tokens (the model's context) cannot be scored. shared: texts
    of one prompt share a row, their common beginning read once, where the model's masks are known. placed: what is
    called in the model's place (a ``ScalarModel`` around it, where it has a head of that kind); None = the model as it
    lies. collective: the processes that call it equally often where it is sharded over them.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    compute_dtype: torch.dtype = torch.float32
    microbatch_tokens: int = 16384
    shared: bool = True
    placed: Placed | None = None
    collective: Collective = _ALONE

    @property
    def max_tokens(self) -> int | None:
        """Longest row the model has positions for, in tokens."""
        return getattr(self._config.get_text_config(), "max_position_embeddings", None)

    @property
    def center(self) -> float:
        """Subtracted from every score, so that SFT demonstrations average 0 (``config.reward_center``)."""
        return float(getattr(self._config, "reward_center", None) or 0.0)

    @property
    def _config(self) -> Any:
        return cast(Any, self.model).config

    def score(self, rollout: Rollout, step: int = 0) -> Tensor:
        """[B] float32 on the rollout's device; NaN for rows longer than the model's context.

        A completion that did not finish is scored as it stands: its turn is never closed for it.
        """
        return self.score_texts(rollout.prompts, rollout.texts, rollout.finished.tolist()).to(rollout.group.device)

    def score_texts(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finished: Sequence[bool] | None = None
    ) -> Tensor:
        """[B] float32 on the CPU: the scores of completions given as text; finished None = all are."""
        return self.score_rows(prompts, self.render(prompts, texts, finished or [True] * len(texts)))

    def score_rows(self, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]) -> Tensor:
        """[B] float32 on the CPU: the scores of rows that ``render`` made of these prompts; NaN for one without tokens
        or of more than the context holds. Rows whose prompt is one object may share a forward's row."""
        scores = torch.full((len(rows),), torch.nan)
        limit = self.max_tokens
        fitting = [i for i, row in enumerate(rows) if row and (limit is None or len(row) <= limit)]
        groups = self._groups(prompts, rows, fitting)
        sizes = [Size.of([0], [shared_length([rows[i] for i in group])]) for group in groups]
        with self._placed.use():
            parts = pack(sizes, self.microbatch_tokens, plain_rows.cells)
            for part in parts:
                chosen = [groups[index] for index in part]
                found = self.forward_groups([[rows[i] for i in group] for group in chosen])
                scores[[i for group in chosen for i in group]] = found.float().cpu() - self.center
            for _ in range(self._missing(len(parts))):
                self.forward([[0]])
        return scores

    def _missing(self, forwards: int) -> int:
        """How many forwards others do that this process has no rows for."""
        if not self._placed.sharded:
            return 0
        count = torch.tensor(forwards, device=next(self.model.parameters()).device)
        return int(self.collective.max(count)) - forwards

    @property
    def _placed(self) -> Placed:
        return self.placed or Placed(callable_model(self.model, self.compute_dtype))

    def _groups(self, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]], fitting: list[int]) -> list[list[int]]:
        """Rows that are scored in one: those of a prompt, while they stay short; alone where masks are not known."""
        if not (self.shared and hasattr(self.model, "score") and masks.known(self.model)):
            return [[i] for i in fitting]
        groups: list[list[int]] = []
        open_group: dict[int, list[int]] = {}
        for i in fitting:
            group = open_group.get(id(prompts[i]))
            if group is None or shared_length([rows[j] for j in (*group, i)]) > LONGEST_SHARED:
                groups.append([i])
                open_group[id(prompts[i])] = groups[-1]
            else:
                group.append(i)
        return groups

    @torch.no_grad()
    def forward_groups(self, groups: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """[n] scores of one forward, group by group; not centred."""
        if all(len(group) == 1 for group in groups):
            return self.forward([group[0] for group in groups])
        model = cast(Any, self.model)
        model.eval()
        rows = share_prefixes(groups).to(next(model.parameters()).device)
        return cast(
            Tensor, self._placed.model(rows.input_ids, None, rows.position_ids, rows.segments, rows.last)["scores"]
        )

    def token_rows(self, rollout: Rollout) -> list[list[int]]:
        """Prompt and completion in this model's own tokens, [B] lists."""
        return self.render(rollout.prompts, rollout.texts, rollout.finished.tolist())

    def render(self, prompts: Sequence[Prompt], texts: Sequence[str], finished: Sequence[bool]) -> list[list[int]]:
        """Prompts and completions in this model's own tokens, [B] lists. Raises UserError where its template refuses a
        conversation."""
        rendered: dict[int, list[int]] = {}
        for prompt in prompts:  # the k completions of a prompt share the object
            if id(prompt) not in rendered:
                rendered[id(prompt)] = render_prompt(self.tokenizer, prompt)
        return [
            rendered[id(prompt)] + render_completion(self.tokenizer, prompt, text, ended)
            for prompt, text, ended in zip(prompts, texts, finished, strict=True)
        ]

    def rows_of_ids(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        conversational: Sequence[bool],
        finished: Sequence[bool],
    ) -> list[list[int]]:
        """Rows of ids that a policy with this tokenizer and template was given and drew, [B] lists: as they are, a
        finished completion ended as ``render`` ends one (``chat.drawn_completion``).

        Raises UserError, which names the row, for an id that the model does not embed.
        """
        special = special_ids(self.tokenizer)
        rows = [
            [*prompt, *drawn_completion(self.tokenizer, special, ids, chat, ended)]
            for prompt, ids, chat, ended in zip(prompts, completions, conversational, finished, strict=True)
        ]
        embedded = cast(Any, self.model).get_input_embeddings().num_embeddings
        for number, row in enumerate(rows):
            if row and not 0 <= min(row) <= max(row) < embedded:
                raise UserError(f"rows.{number}: an id outside 0 … {embedded - 1}, which the model embeds")
        return rows

    @torch.no_grad()
    def forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[n] scores of one padded forward, read at each row's last token; not centred."""
        model = cast(Any, self.model)
        device = next(model.parameters()).device
        ids, mask = (value.to(device) for value in pad_rows(rows, side="right"))
        model.eval()
        if hasattr(model, "score"):  # a decoder with a scalar head: read by the mask, never by pad ids
            positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
            return cast(Tensor, self._placed.model(ids, mask.long(), positions)["scores"])
        low = self.compute_dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(device.type, dtype=self.compute_dtype if low else None, enabled=low):
            found = self._placed.model(input_ids=ids, attention_mask=mask.long())
            return cast(Tensor, found.logits.squeeze(-1))


def callable_model(model: nn.Module, compute_dtype: torch.dtype) -> nn.Module:
    """A decoder with a scalar head as ``ScalarModel``; another classifier as it is."""
    return ScalarModel(model, compute_dtype=compute_dtype) if hasattr(model, "score") else model


def load_reward_model(
    path: str,
    *,
    device: torch.device | str,
    compute_dtype: torch.dtype = torch.float32,
    microbatch_tokens: int = 16384,
    name: str | None = None,
    placement: Placement = "replicate",
    collective: Collective = _ALONE,
    quantize: Quantization | None = None,
) -> RewardModel:
    """A frozen reward model and its tokenizer from a folder or the hub.

    Weights are float32 when computing in float32, else in the type they were stored in; quantize: those of its linear
    layers in fewer bits, its score head aside. Raises UserError where nothing can be loaded, where the head has another
    number of outputs than one, where weights are missing (they would be random, and a random head still gives scores),
    and where the canary's texts show that the scores mean nothing.
    """
    from transformers import AutoModelForSequenceClassification

    where = f"reward.models: path={path}"
    tokenizer, _ = checked_parts(path, where)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=torch.float32 if compute_dtype == torch.float32 else "auto",
            output_loading_info=True,
            use_safetensors=True,
            **(quantize.loading() if quantize is not None else {}),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: no reward model could be loaded ({_first_line(error)})") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(
            f"{where}: the checkpoint lacks weights ({missing}); they would be random: train it with objective=reward"
        )
    if quantize is not None:
        quantized.settle(model, where)
    model.requires_grad_(False).eval()
    loaded = RewardModel(
        name=name or short_name(path),
        model=model,
        tokenizer=tokenizer,
        compute_dtype=compute_dtype,
        microbatch_tokens=microbatch_tokens,
        placed=place(callable_model(model, compute_dtype), placement, torch.device(device), collective),
        collective=collective,
    )
    refuse_noise(loaded, where)
    return loaded


def refuse_noise(loaded: RewardModel, where: str) -> None:
    """Raises UserError where the canary's texts show that the scores mean nothing."""
    with loaded._placed.use():
        canary.scores_mean_something(
            loaded.forward,
            loaded.model,
            loaded.tokenizer,
            where=where,
            max_tokens=loaded.max_tokens,
            # 8 bits of mantissa, sums in another order
            tolerance=1e-4 if loaded.compute_dtype == torch.float32 else 0.1,
        )


def checked_parts(path: str, where: str) -> tuple[Any, Any]:
    """The reward model's tokenizer and configuration, after what can be refused without reading the weights."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path)
        if config.num_labels != 1:
            raise UserError(
                f"{where}: has {config.num_labels} outputs (num_labels), and a reward model has one; a language model "
                "becomes one with objective=reward"
            )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: no reward model could be loaded ({_first_line(error)})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up for a folder without one
        raise UserError(f"{where}: holds no tokenizer, and a reward model reads text with its own; save it beside it")
    canary.tokenizer_fits(tokenizer, getattr(config.get_text_config(), "vocab_size", None), where)
    return tokenizer, config


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def short_name(path: str) -> str:
    """What scores of this model are called: ``runs/quickstart-reward/final`` → ``quickstart-reward``."""
    place = Path(path)
    return place.parent.name if place.name == "final" and place.parent.name else place.name
