"""The memory ledger: what a model takes on a phone, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from iris.errors import require_choice
from iris.model import IrisModel

MIB = 2**20
TEXT_ENCODERS = ("ViT-L/14",)
ENCODING = {"encoder", "quant_conv"}  # what of a latent only encodes, in ours and in diffusers' autoencoders

# Totals in IRIS's document, in MiB: they leave nearly the same remainder, 502 to 509, when the generator's weights are
# taken off, and only in MiB do they.
DOCUMENT = {"tiny": 545, "small": 597, "base": 760}


@dataclass(frozen=True)
class LedgerRow:
    """One part. ``parameters`` None: it has no weights; ``generating`` False: not needed to make an image."""

    part: str
    parameters: int | None
    bytes: int
    generating: bool = True

    @property
    def mib(self) -> float:
        """Size in MiB (2^20 bytes)."""
        return self.bytes / MIB


def memory_ledger(
    model: IrisModel,
    text_encoder: str | None = None,
    dtype: torch.dtype = torch.float16,
    activations: int | None = None,
    text_dtype: torch.dtype | None = None,
) -> list[LedgerRow]:
    """What ``model`` takes in ``dtype``, part by part; it may lie on the meta device.

    Args:
        model: generator and latent.
        text_encoder: "ViT-L/14" adds CLIP's text model, counted from its shape, without its weights.
        dtype: of the weights.
        activations: measured peak of the tensors alive while one image is made, in bytes; None: no such row.
        text_dtype: of the text encoder's weights, if another (None: ``dtype``).

    Raises:
        SettingError: unknown text encoder.
    """
    decoder, encoder = _latent_parts(model.latent)
    rows = [
        _weights("generator", model.generator.parameters(), dtype),
        _weights("decoder", decoder, dtype),
        _weights("encoder", encoder, dtype, generating=False),
    ]
    if text_encoder is not None:
        require_choice("text_encoder", text_encoder, TEXT_ENCODERS)
        from iris.text.clip import shape_only

        rows.insert(0, _weights("text encoder", shape_only().parameters(), text_dtype or dtype))
    if activations is not None:
        rows.append(LedgerRow("activations", None, activations))
    return rows


def total(rows: Sequence[LedgerRow], resident: bool = True) -> int:
    """Bytes needed to make an image, with the text encoder kept (``resident``) or freed once it has encoded."""
    return sum(row.bytes for row in rows if row.generating and (resident or row.part != "text encoder"))


def _weights(part: str, parameters: Iterable[nn.Parameter], dtype: torch.dtype, generating: bool = True) -> LedgerRow:
    count = sum(parameter.numel() for parameter in parameters)
    return LedgerRow(part, count, count * dtype.itemsize, generating)


def _latent_parts(latent: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The latent's weights that decode, and those that only encode."""
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, parameter in latent.named_parameters():
        parts[not ENCODING.isdisjoint(name.split("."))].append(parameter)
    return parts
