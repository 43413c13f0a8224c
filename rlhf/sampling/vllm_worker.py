"""What vLLM's own processes are given: methods that put the policy's weights into place. Loaded by vLLM by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

WORKER = f"{__name__}.PolicyWorker"


class PolicyWorker:
    """Added to the class of vLLM's workers (``--worker-extension-cls``)."""

    def take_policy(self, folder: str) -> None:
        """Replaces all weights by those of the folder's safetensors files."""
        worker: Any = self
        worker.reload_weights(weights_iterator=_weights(Path(folder)))
        repack_heads(worker)


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                yield name, opened.get_tensor(name)


def repack_heads(worker: Any) -> None:
    """On a CPU the output head keeps a packed copy of its weights that ``reload_weights`` forgets: outputs stay those
    of the old head, without an error."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in worker.model_runner.get_model().modules():
        if isinstance(module, VocabParallelEmbedding):
            module.quant_method.process_weights_after_loading(module)
