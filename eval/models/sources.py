"""A model's parts one at a time, from a saved folder or with drawn weights: memory holds no more than is wanted."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from eval.export.host.tokenise import drawn_numbers
from eval.models.ledger import ENCODING
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.latents import Latent, build_latent
from iris.model import CONFIG, LATENT_WEIGHTS, TEXT_ENCODER, WEIGHTS, TextToLatent, read_sampling
from iris.nn.condition import TextCondition
from iris.nn.generator import Generator, GeneratorConfig
from iris.pipeline import IrisPipeline
from iris.presets import preset_config
from iris.randomness import initialise
from iris.text import TextEncoder, build_text_encoder
from iris.text.clip import VIT_L_14


class Source(ABC):
    """Makes the parts of one model, ready to run in ``dtype`` on ``device``; it keeps none of them.

    Attributes:
        size: side in pixels of its images.
        text_length: text tokens that its generator reads.
        text_name: the kind of its text encoder, a key of ``iris.text.TEXT_ENCODERS``.
        sampling: how it says that images are made; None: it says nothing.
    """

    size: int
    text_length: int
    text_name: str
    sampling: SamplingSettings | None = None

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    @abstractmethod
    def text(self) -> TextEncoder:
        """The text encoder."""

    @abstractmethod
    def generator(self) -> Generator:
        """The generator."""

    @abstractmethod
    def latent(self) -> Latent:
        """The latent, encoder and decoder."""

    @abstractmethod
    def pipeline(self) -> IrisPipeline:
        """All parts together."""

    def decoder(self) -> Latent:
        """The latent without what only encodes."""
        latent = self.latent()
        for module in list(latent.modules()):
            for name in ENCODING & set(module._modules):
                del module._modules[name]
        return latent

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the latents."""
        return self._empty_latent().grid(self.size, self.size)  # on the meta device torch would import 165 MB

    @abstractmethod
    def _empty_latent(self) -> Latent:
        """The latent as constructed."""

    @contextmanager
    def _placed(self) -> Iterator[None]:
        """Modules made inside have their weights in ``dtype`` on ``device`` from the start: no copy of them is made."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                yield
        finally:
            torch.set_default_dtype(before)


class Saved(Source):
    """A folder that ``IrisPipeline.save_pretrained`` or a trial wrote.

    Raises:
        SettingError: the folder, config.json or a file of weights is missing or not readable.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self.folder = folder
        try:
            self.config = json.loads((folder / CONFIG).read_text())
            self.size, text = int(self.config["size"]), self.config["text"]
            self.sampling = read_sampling(self.config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingError(f"model={folder}: {CONFIG} is not one that a pipeline wrote ({error!r})") from error
        self.text_name, lengths = text.get("name", "words"), {"words": text.get("length"), "labels": 1}
        self.text_length = lengths.get(self.text_name, VIT_L_14["max_position_embeddings"])

    def text(self) -> TextEncoder:
        values = dict(self.config["text"])
        if (self.folder / TEXT_ENCODER).is_dir():
            values["source"] = str(self.folder)
        with self._placed():
            encoder = build_text_encoder(values)
        if not encoder.frozen:
            self._fill(encoder, WEIGHTS, "text.")
        return encoder.to(self.device, self.dtype).eval()

    def generator(self) -> Generator:
        with self._placed():
            generator = Generator(GeneratorConfig.from_dict(self.config["generator"]))
        return self._fill(generator, WEIGHTS, "generator.").eval()

    def latent(self) -> Latent:
        with self._placed():
            latent = self._empty_latent()
        return self._fill(latent, LATENT_WEIGHTS, "").eval()

    def _empty_latent(self) -> Latent:
        return build_latent(self.config["latent"]["name"], **self.config["latent"]["options"])

    def pipeline(self) -> IrisPipeline:
        return IrisPipeline.from_pretrained(self.folder).to(self.device, self.dtype)

    def _fill(self, module: nn.Module, file: str, prefix: str) -> Any:
        """Read the weights under ``prefix`` one tensor at a time."""
        state, read = module.state_dict(), set()
        try:
            with safetensors.safe_open(self.folder / file, "pt") as tensors, torch.no_grad():
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    if name.startswith(prefix):
                        state[name.removeprefix(prefix)].copy_(tensors.get_tensor(name))
                        read.add(name.removeprefix(prefix))
            # a frozen latent brought all weights but its statistics
            if missing := sorted(set(state) - read if not getattr(module, "frozen", False) else ()):
                raise KeyError(missing[0])
        except (OSError, safetensors.SafetensorError, KeyError, RuntimeError) as error:
            raise SettingError(f"model={self.folder}: {file} does not hold this model's weights ({error!r})") from error
        return module


class Drawn(Source):
    """A size of IRIS with drawn weights behind a text encoder of the shape of CLIP ViT-L/14.

    Raises:
        SettingError: an unknown size, or ``changes`` that ``iris.presets`` refuses.
    """

    def __init__(self, preset: str, changes: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self.config, surroundings = preset_config(preset, changes)
        self.size = surroundings["size"]
        self.latent_name, self.latent_options = surroundings["latent"], surroundings["latent_options"]
        self.text_name, self.text_length = "clip", VIT_L_14["max_position_embeddings"]

    def text(self) -> TextEncoder:
        with self._placed():
            return DrawnCLIP(self.config.text_width).eval()

    def generator(self) -> Generator:
        with self._placed():
            return initialise(Generator(self.config), 0).eval()

    def latent(self) -> Latent:
        with self._placed():
            return initialise(self._empty_latent(), 0).eval()

    def _empty_latent(self) -> Latent:
        return build_latent(self.latent_name, **self.latent_options)

    def pipeline(self) -> IrisPipeline:
        model = TextToLatent(self.text(), self.generator())
        return IrisPipeline(model, self.latent(), self.latent_name, self.latent_options, self.size)


class DrawnCLIP(TextEncoder):
    """CLIP's text model at ViT-L/14's shape (or ``width`` wide) with drawn weights.

    A caption's token numbers are drawn too, addressed by the caption, since CLIP's vocabulary comes with its weights.
    """

    frozen = True

    def __init__(self, width: int) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        self.shape = VIT_L_14 | {"hidden_size": width, "intermediate_size": 4 * width}
        if width != VIT_L_14["hidden_size"]:
            self.shape |= {"num_attention_heads": 1}
        self.width, self.length = width, self.shape["max_position_embeddings"]
        self.model = CLIPTextModel(CLIPTextConfig(**self.shape)).requires_grad_(False)

    def tokenise(self, captions: Sequence[str]) -> Tensor:
        return torch.from_numpy(drawn_numbers(captions, self.shape["vocab_size"], self.length))

    def forward(self, numbers: Tensor) -> TextCondition:
        out = self.model(input_ids=numbers)
        return TextCondition(out.last_hidden_state, torch.ones_like(numbers, dtype=torch.bool), out.pooler_output)

    def to_dict(self) -> dict[str, Any]:
        return {"name": "drawn clip", "width": self.width}
