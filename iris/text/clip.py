"""CLIP's text model, pretrained and frozen, through transformers (arXiv 2103.00020)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iris.errors import SettingError, require_choice
from iris.io.tensors import DTYPES
from iris.nn.condition import TextCondition
from iris.text.base import TextEncoder
from iris.text.hub import explain, locate

# The text model of openai/clip-vit-large-patch14, which is that of Stable Diffusion 1.x. These are all the fields on
# which its encoding depends; eos_token_id 2 is transformers' mark of old files, where the end is the largest number.
VIT_L_14 = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 2,
}
LARGEST = 2


class CLIPText(TextEncoder):
    """Captions -> the last hidden state after the final LayerNorm, as Stable Diffusion 1.x uses it.

    ViT-L/14 gives [B, 77, 768]. Longer captions are cut, their end token kept. All tokens count, the padding too, since
    Stable Diffusion does not mask it. ``pooled`` is the state at the end token. The model is never trained: it stays in
    evaluation mode, runs without gradient, and its weights are left out of state dicts, because ``to_dict`` names where
    they come from.

    Args:
        source: hub name or folder of a CLIP (its text part is used), a CLIP text model, or a whole diffusers pipeline.
        dtype: float32, float16 or bfloat16, of the weights and of the condition.

    Raises:
        SettingError: unknown dtype; files that are missing or unreadable; a tokenizer that does not fit the model.
    """

    frozen = True

    def __init__(self, source: str = "openai/clip-vit-large-patch14", dtype: str = "float32") -> None:
        super().__init__()
        require_choice("model.text_dtype", dtype, tuple(DTYPES))
        self.source, self.dtype = str(source), dtype
        self.model, self.tokenizer = _load(self.source)
        self.model.to(DTYPES[dtype]).requires_grad_(False)
        self.width, self.length = self.model.config.hidden_size, self.model.config.max_position_embeddings
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_put_back)
        self.eval()

    def train(self, mode: bool = True) -> CLIPText:
        """Stays in evaluation mode."""
        return super().train(False)

    def tokenise(self, captions: Sequence[str]) -> Tensor:
        rows = self.tokenizer(list(captions), padding="max_length", max_length=self.length, truncation=True)
        return torch.tensor(rows["input_ids"], dtype=torch.int64).reshape(len(captions), self.length)

    @torch.no_grad()
    def forward(self, numbers: Tensor) -> TextCondition:
        out = self.model(input_ids=numbers)
        return TextCondition(out.last_hidden_state, torch.ones_like(numbers, dtype=torch.bool), out.pooler_output)

    def to_dict(self) -> dict[str, Any]:
        return {"name": "clip", "source": self.source, "dtype": self.dtype}

    def facts(self) -> dict[str, Any]:
        """The model's shape and the tokenizer's words, wherever they were read from."""
        words = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return {field: getattr(self.model.config, field) for field in VIT_L_14} | {
            "name": "clip",
            "words": hashlib.sha256(words.encode()).hexdigest(),
            "padding": self.tokenizer.pad_token_id,
        }

    def save(self, folder: Path) -> None:
        """Write model and tokenizer to ``folder``, from which ``CLIPText(folder)`` reads them."""
        with _quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def shape_only(config: Mapping[str, Any] = VIT_L_14) -> nn.Module:
    """A CLIP text model without weights (on the meta device): what parameters and memory are counted on."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(**config))


def _load(source: str) -> tuple[nn.Module, Any]:
    """The text model and its tokenizer."""
    from transformers import CLIPTextModel, CLIPTokenizerFast  # ty: ignore[missing-module-member]

    folder, words = locate(source)
    try:
        with _quiet():
            model, found = CLIPTextModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            tokenizer = CLIPTokenizerFast.from_pretrained(words, local_files_only=True)
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise SettingError(explain(source, f"its files are not readable as a CLIP text model ({error!r})")) from error
    if missing := sorted(found["missing_keys"]):
        raise SettingError(explain(source, f"{folder} holds no whole CLIP text model, {missing[0]} is missing"))
    _check_tokenizer(source, tokenizer, model.config)
    return model, tokenizer


def _check_tokenizer(source: str, tokenizer: Any, config: Any) -> None:
    """A tokenizer of another model would give numbers without a vector, or an end that the pooling does not find."""
    largest, end = max(tokenizer.get_vocab().values()), tokenizer.eos_token_id
    if largest >= config.vocab_size:
        raise SettingError(
            explain(source, f"its tokenizer gives numbers up to {largest}, its model has {config.vocab_size}")
        )
    expected = largest if config.eos_token_id == LARGEST else config.eos_token_id
    if end != expected:
        raise SettingError(explain(source, f"its tokenizer ends captions with {end}, its model expects {expected}"))


def _leave_out(encoder: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _put_back(encoder: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Let a strict ``load_state_dict`` find the weights that ``_leave_out`` left out."""
    for name, weight in encoder.named_parameters():
        state.setdefault(prefix + name, weight)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no report of the vision weights that a whole CLIP holds beside its text model."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
