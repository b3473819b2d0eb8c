"""Judge ``shapes``: a small two-tower CLIP for the drawn worlds, made of open_clip's own classes.

CLIP: Radford et al. 2021 (arXiv:2103.00020); the image tower is its ModifiedResNet, the text tower its causal
transformer, over a word-level vocabulary (open_clip's 49k-entry table would be many times the size of the whole judge).
Linear heads on the image embedding read each attribute of ``shapes`` and ``shapes2``. ``eval.judges.train_shapes``
makes the weights and their record, shapes.safetensors and shapes.json beside this file.

What it can read: pictures blurred to a sigma of 1 pixel or with noise up to a standard deviation of 0.12 (of the range
[-1, 1]), as in its training. Beyond, it fails before an eye does: held-out ``shapes`` pictures keep a shape accuracy of
0.965 with noise of 0.2 and fall to chance with 0.4. So part of a noisy generator's low accuracy is the judge's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from eval.judges import Description, Judge
from eval.judges.images import check_batch, in_batches, resized
from eval.judges.weights import file_sha256
from iris.errors import SettingError

WEIGHTS = Path(__file__).with_name("shapes.safetensors")
RECORD = Path(__file__).with_name("shapes.json")
PAD, START = 0, 1  # the end token is the last id: open_clip pools at the highest id
BATCH = 256  # images or captions that go through a tower at once


class WordTokenizer:
    """Captions -> ids over a fixed list of words; case and punctuation do not count."""

    def __init__(self, words: Iterable[str], context_length: int) -> None:
        self.ids = {word: i + 2 for i, word in enumerate(words)}
        self.context_length = context_length
        self.end = len(self.ids) + 2

    @property
    def vocabulary_size(self) -> int:
        """Words plus padding, start and end."""
        return self.end + 1

    def __call__(self, captions: list[str]) -> Tensor:
        """int64 [B, context_length]: start, words, end, padding.

        Raises:
            SettingError: a caption has a word that the judge never saw, or is too long for it.
        """
        rows = torch.full((len(captions), self.context_length), PAD, dtype=torch.long)
        for row, text in zip(rows, captions, strict=True):
            words = re.findall(r"\w+", text.lower())
            unknown = [word for word in words if word not in self.ids]
            if unknown:
                raise SettingError(
                    f"judge shapes does not know the word '{unknown[0]}' of the caption '{text}'; "
                    "choose another judge for captions from outside the drawn worlds"
                )
            if len(words) + 2 > self.context_length:
                limit = self.context_length - 2
                raise SettingError(f"judge shapes reads captions of up to {limit} words, not '{text}'")
            row[: len(words) + 2] = torch.tensor([START, *(self.ids[word] for word in words), self.end])
        return rows


class TwoTowers(nn.Module):
    """open_clip's CLIP and one linear head a world on the image embedding.

    Args:
        architecture: {"embed_dim", "vision_cfg", "text_cfg"} as open_clip's model configs.
        heads: world -> {attribute: number of classes}.
    """

    def __init__(self, architecture: dict[str, Any], heads: dict[str, dict[str, int]]) -> None:
        super().__init__()
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg  # seconds that a description does without

        width = architecture["embed_dim"]
        self.clip = CLIP(width, CLIPVisionCfg(**architecture["vision_cfg"]), CLIPTextCfg(**architecture["text_cfg"]))
        self.classes = heads
        self.heads = nn.ModuleDict({world: nn.Linear(width, sum(sizes.values())) for world, sizes in heads.items()})

    def attribute_logits(self, world: str, embedding: Tensor) -> dict[str, Tensor]:
        """Image embedding [B, D] -> {attribute: logits [B, classes]}."""
        sizes = self.classes[world]
        return dict(zip(sizes, self.heads[world](embedding).split(list(sizes.values()), dim=-1), strict=True))


class ShapesJudge(Judge):
    """The trained judge, loaded from the weights beside this file (or ``weights`` and ``record``).

    Raises:
        FileNotFoundError: weights or record are missing.
        ValueError: the weights' sha256 is not the recorded one.
    """

    name = "shapes"
    has_text = True

    def __init__(self, device: str | torch.device = "cpu", weights: Path = WEIGHTS, record: Path = RECORD) -> None:
        super().__init__(self.description(weights, record), device)
        stored = json.loads(record.read_text())
        # Embeddings in units of their own size, so that FID and the cubic kernel of KID are numbers of a readable size.
        self.feature_rms = stored["record"].get("feature_rms", 1.0)
        self.classes = {
            world: {name: len(values) for name, values in attributes.items()}
            for world, attributes in stored["attributes"].items()
        }
        self.size = stored["architecture"]["vision_cfg"]["image_size"]
        self.tokenizer = WordTokenizer(stored["vocabulary"], stored["architecture"]["text_cfg"]["context_length"])
        self.towers = TwoTowers(stored["architecture"], self.classes)
        self.towers.load_state_dict(
            {
                name: value.float() if value.is_floating_point() else value
                for name, value in safetensors.torch.load_file(weights).items()
            }
        )
        self.towers.eval().requires_grad_(False).to(self.device)

    @classmethod
    def description(cls, weights: Path = WEIGHTS, record: Path = RECORD) -> Description:
        """What is known without loading the network."""
        for file in (weights, record):
            if not file.is_file():
                raise FileNotFoundError(f"judge shapes needs {file}; make it with: python -m eval.judges.train_shapes")
        stored = json.loads(record.read_text())
        sha256 = file_sha256(weights)
        if sha256 != stored["record"]["sha256"]:
            raise ValueError(
                f"judge shapes: {weights} has sha256 {sha256}, its record says "
                f"{stored['record']['sha256']}; restore the file or train the judge again"
            )
        architecture = stored["architecture"]
        size = architecture["vision_cfg"]["image_size"]
        return Description(
            sha256,
            "FD (shapes)",
            f"bicubic-antialias-{size}",
            architecture["embed_dim"],
            tuple(stored["attributes"]),
            record=stored["record"],
        )

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """Float images [B, 3, H, W] in [-1, 1], any H and W -> float32 [B, D], not normalised.

        Raises:
            ValueError: see ``eval.judges.images.check_batch``.
        """
        return self._embedding(images) / self.feature_rms

    def _embedding(self, images: Tensor) -> Tensor:
        check_batch(images)
        return in_batches(self._image_tower, images, BATCH)

    def _image_tower(self, images: Tensor) -> Tensor:
        return self.towers.clip.encode_image(resized(images.to(self.device), self.size))

    @torch.inference_mode()
    def text_features(self, captions: list[str]) -> Tensor:
        """Captions [B] -> float32 [B, D], not normalised.

        Raises:
            SettingError: a caption has a word that the judge never saw, or is too long for it.
        """
        parts = [self.towers.clip.encode_text(part.to(self.device)) for part in self.tokenizer(captions).split(BATCH)]
        return torch.cat(parts)

    def attributes(self, world: str, images: Tensor) -> dict[str, Tensor]:
        """Predicted class of each attribute of a drawn world: {name: int64 [B]}.

        Raises:
            SettingError: a world that the judge was not trained on.
        """
        if world not in self.worlds:
            return super().attributes(world, images)
        with torch.inference_mode():
            logits = self.towers.attribute_logits(world, self._embedding(images))
        return {name: value.argmax(dim=-1) for name, value in logits.items()}
