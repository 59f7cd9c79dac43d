"""Transformers' generation over a decoder of ours (`loop_over`, `generated_ids`)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ...models.errors import EnvironmentMissingError, UsageError
from ..runners.base import Array
from .reader import Reader


def loop_over(reader: Reader, vocabulary: int | None) -> Any:
    """A model of transformers that computes its logits with a reader, and generates as all its models do.

    Args:
        reader: computes the logits.
        vocabulary: the number of token ids, which transformers 5.15 reads in a beam search; None if unknown.

    Raises:
        EnvironmentMissingError: transformers is not installed.
    """
    return _decoder_class()(reader, vocabulary)


def generated_ids(
    model: Any, ids: Array, mask: Array, config: Any, *, tokenizer: Any = None, streamer: Any = None
) -> Array:
    """The tokens of each row and those that follow, `[batch, length + new]`; rows that end early end in padding.

    Args:
        model: from `loop_over`.
        ids: token ids, `[batch, length]`, int64, padded on the left.
        mask: 0 at padding and otherwise 1, as `ids`.
        config: transformers' `GenerationConfig`.
        tokenizer: transformers' tokenizer, which texts that end the generation require.
        streamer: transformers' streamer, which is given each token.

    Raises:
        UsageError: transformers rejects the settings.
    """
    import torch

    given = {"tokenizer": tokenizer} if tokenizer is not None else {}
    try:
        with torch.inference_mode():
            result = model.generate(
                torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), generation_config=config,
                streamer=streamer, **given,
            )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"generation settings: {' '.join(str(error).split())[:300]}") from error
    return np.asarray(result.numpy())


@cache
def _decoder_class() -> Any:
    """The class of a model of transformers that computes its logits with a reader.

    Made at the first use, because transformers takes seconds to import.
    """
    transformers = import_transformers()
    import torch
    from transformers.modeling_outputs import CausalLMOutput

    class ReaderModel(transformers.PreTrainedModel, transformers.GenerationMixin):  # type: ignore[name-defined]
        config_class = transformers.PreTrainedConfig
        main_input_name = "input_ids"
        _is_stateful = True  # the reader keeps the cache, so transformers must not cut it

        def __init__(self, reader: Reader, vocabulary: int | None) -> None:
            config = transformers.PreTrainedConfig()
            config.vocab_size = vocabulary
            super().__init__(config)
            self._reader = reader

        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

        def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> dict[str, Any]:
            return {"input_ids": input_ids, "attention_mask": attention_mask}

        def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
            ids = input_ids.numpy()
            mask = np.ones_like(ids) if attention_mask is None else attention_mask.numpy()
            return CausalLMOutput(logits=torch.from_numpy(self._reader.logits(ids, mask))[:, None])

    return ReaderModel


def import_transformers() -> Any:
    """Import transformers, or say how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentMissingError(
            'generating text requires transformers. Install it with: pip install "rmsnorm-deploy[hf]"'
        ) from error
    return transformers
