"""Prompts, and what guidance leads away from, as the generator reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from iris.nn.condition import TextCondition
from iris.text.base import TextEncoder


def encode_prompts(
    encoder: TextEncoder,
    prompts: Sequence[str],
    against: Sequence[str] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[TextCondition, TextCondition | None]:
    """Encode prompts and what guidance leads away from, in one batch.

    Args:
        encoder: on ``device``. A frozen one, which may be large, encodes each different text once.
        prompts: N texts.
        against: N texts, one for each prompt; None: no guidance.
        dtype: of the encoded texts, the generator's.

    Returns:
        the conditions [N, ...] of ``prompts`` and of ``against`` (None without).

    Raises:
        SettingError: a text that the encoder cannot read.
    """
    count = len(prompts)
    numbers = encoder.tokenise([*prompts, *(against or ())]).to(device)
    if encoder.frozen:
        numbers, row = numbers.unique(dim=0, return_inverse=True)
        text = TextCondition(*(part[row] for part in encoder(numbers)))
    else:
        text = encoder(numbers)
    text = TextCondition(text.tokens.to(dtype), text.mask, text.pooled.to(dtype))
    null = None if against is None else TextCondition(*(part[count:] for part in text))
    return TextCondition(*(part[:count] for part in text)), null
