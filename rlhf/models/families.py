"""What families of models need beside transformers' own classes: the text part of one that also sees, and which
variants are read right here."""

from __future__ import annotations

from typing import Any

from rlhf.errors import UserError

# Checkpoints that also see name their text model's weights so; its own class names them without.
_SEEING = ("gemma3", "gemma4")
_TEXT_NAMES = {r"^model\.language_model\.": "model.", r"^language_model\.model\.": "model."}


def text_part(config: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """The configuration to build a language model from, and keywords of ``from_pretrained`` that find its weights.

    Of a Gemma 3 or 4 that also sees it is the text model's: no prompt here has a picture, and what sees would be held,
    and waited for by DDP. where: key and path, for messages. Raises UserError for variants that are not read right.
    """
    text = config.get_text_config()
    refuse_variant(text, where)
    if text is config or config.model_type not in _SEEING:
        return config, {}
    if getattr(text, "dtype", None) is None:
        text.dtype = getattr(config, "dtype", None)
    return text, {"key_mapping": _TEXT_NAMES}


def refuse_variant(text: Any, where: str) -> None:
    """Raises UserError for a text configuration that loads and would be trained, planned or quantized wrongly."""
    if getattr(text, "enable_moe_block", False):
        raise UserError(
            f"{where}: a mixture of experts (as Gemma 4 26B A4B); adapters, quantizing and plans here know linear "
            "layers, and experts are none; take a dense model (E2B, E4B, 31B)"
        )
    if getattr(text, "use_bidirectional_attention", None) in ("all", True):
        raise UserError(f"{where}: its tokens see those behind them (use_bidirectional_attention), so it has no log π")


def forget_names(model: Any) -> None:
    """transformers writes a model under the names that it was read from, which its own class does not know."""
    if getattr(model.config, "model_type", "").startswith(("gemma3_text", "gemma4_text")):
        model._weight_conversions = None
