"""Judges ``clip``, any CLIP that open_clip can build, and ``clip_vit_b32``, OpenAI's ViT-B/32 of the CLIP score.

CLIP: Radford et al. 2021 (arXiv:2103.00020); CLIP score: Hessel et al. 2021 (arXiv:2104.08718). Networks, tokenisers
and preprocessing are open_clip's. Weights are a tag of open_clip, found in the caches that it fills; a file (its
.safetensors or state dict, or OpenAI's TorchScript archive); or a folder with open_clip_config.json, as on the Hub.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eval.judges import Description, Judge
from eval.judges.clip_tags import VIT_B_32
from eval.judges.clip_weights import Source, find_source
from eval.judges.images import check_batch, in_batches, to_pixels
from eval.judges.weights import MissingWeights, is_torchscript

IMAGE_BATCH, TEXT_BATCH = 64, 256


class ClipJudge(Judge):
    """Image and text embeddings of a CLIP, [B, D], not normalised.

    Captions longer than the network's context (77 tokens in OpenAI's) are cut, as everywhere.

    Args:
        device: where it runs.
        weights: a tag such as laion2b_s34b_b79k, a file, or a folder.
        model: open_clip's name, such as ViT-L-14 or ViT-L-14-quickgelu; not for a folder, which has its own.
        prefix: put before every caption. Hessel et al. take "A photo depicts "; most papers since take none.

    Raises:
        SettingError: no such model or tag, or weights of another activation or another network than ``model``.
        MissingWeights: no such file, or none in the caches.
        ValueError: the file does not fit the network, or the cached one has another hash.
    """

    name = "clip"
    options = ("weights", "model", "prefix")
    has_text = True

    def __init__(
        self, device: str | torch.device = "cpu", weights: str | None = None, model: str | None = None, prefix: str = ""
    ) -> None:
        source = find_source(self.name, model, weights)
        super().__init__(self._described(source, prefix), device)
        self.prefix = prefix
        self.network = _load(self.name, source, self.device)
        self.tokenise = _tokeniser(self.name, source)
        self.transform = _transform(source)

    @classmethod
    def description(cls, weights: str | None = None, model: str | None = None, prefix: str = "") -> Description:
        """What is known without loading the network."""
        return cls._described(find_source(cls.name, model, weights), prefix)

    @staticmethod
    def _described(source: Source, prefix: str) -> Description:
        size, how = source.image_size, source.preprocess
        details = source.label if source.verified else f"{source.label}, unverified weights"
        record = {
            "model": source.label,
            "weights_file": source.path.name,
            "weights_tag": source.tag,
            "activation": "quick_gelu" if source.quick_gelu else "gelu",
            "prefix": prefix,
            "mean": list(how["mean"]),
            "std": list(how["std"]),
        }
        return Description(
            source.sha256,
            f"FD-CLIP ({details})",
            f"open_clip-pil-{how['resize_mode']}-{how['interpolation']}-{size}",
            source.config["embed_dim"],
            verified=source.verified,
            record=record,
        )

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """Float images [B, 3, H, W] in [-1, 1], any H and W -> float32 [B, D], not normalised.

        Raises:
            ValueError: see ``eval.judges.images.check_batch``.
        """
        check_batch(images)
        return in_batches(self._embed, images, IMAGE_BATCH)

    def _embed(self, images: Tensor) -> Tensor:
        return self.network.encode_image(self.preprocess(images).to(self.device), normalize=False)

    def preprocess(self, images: Tensor) -> Tensor:
        """Float images [B, 3, H, W] in [-1, 1] -> what the image tower takes, float32 [B, 3, S, S] on the CPU.

        open_clip's own transform of 8-bit PIL images. On tensors it is another one: PIL cuts off bicubic overshoot
        between its two passes, which at a hard edge is up to 16 of 255 levels.
        """
        return torch.stack([self.transform(Image.fromarray(picture)) for picture in to_pixels(images).cpu().numpy()])

    @torch.inference_mode()
    def text_features(self, captions: list[str]) -> Tensor:
        """Captions [B] -> float32 [B, D], not normalised.

        Raises:
            ValueError: no captions.
        """
        if not captions:
            raise ValueError("captions: at least one is needed")
        tokens = self.tokenise([self.prefix + caption for caption in captions])
        parts = [self.network.encode_text(part.to(self.device), normalize=False) for part in tokens.split(TEXT_BATCH)]
        return torch.cat(parts).float()


class ClipVitB32Judge(ClipJudge):
    """OpenAI's ViT-B/32, the network of the CLIP score; ``weights`` may name a copy of its file."""

    name = "clip_vit_b32"
    options = ("weights", "prefix")

    def __init__(self, device: str | torch.device = "cpu", weights: str = "openai", prefix: str = "") -> None:
        super().__init__(device, weights, VIT_B_32, prefix)

    @classmethod
    def description(cls, weights: str = "openai", prefix: str = "") -> Description:
        """What is known without loading the network."""
        return super().description(weights, VIT_B_32, prefix)


def _load(judge: str, source: Source, device: torch.device) -> torch.nn.Module:
    """open_clip's network with the weights of a file.

    Raises:
        ValueError: the file does not fit the network.
    """
    import open_clip

    try:
        # The random start that the weights replace must not move the caller's random numbers. A TorchScript archive is
        # loaded by torch.jit, which unpickles nothing; anything else by weights_only.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript: deprecated, and what OpenAI's files are
            network = open_clip.create_model(
                source.model,
                None if source.folder else str(source.path),
                device=device,
                require_pretrained=True,
                weights_only=not is_torchscript(source.path),
                force_preprocess_cfg=source.preprocess,
            )
    except Exception as error:  # of a dozen kinds, by file format
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"judge {judge}: {source.path} does not hold the weights of {source.label}: {reason}"
        ) from error
    return network.float().eval().requires_grad_(False)


def _tokeniser(judge: str, source: Source) -> Any:
    """Captions [B] -> int64 [B, context]. CLIP's own comes with open_clip; others lie on the Hub."""
    import open_clip

    try:
        return open_clip.get_tokenizer(source.model)
    except OSError as error:
        where = source.config["text_cfg"].get("hf_tokenizer_name", source.label)
        raise MissingWeights(
            f"judge {judge}: the tokeniser of {source.label} is missing; get it by "
            f"`hf download {where}`, or set judge.weights to a folder that holds it"
        ) from error


def _transform(source: Source) -> Any:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(size=source.image_size, **source.preprocess), is_train=False)
