"""Judge ``inception``: the Inception v3 of FID, resized as clean-fid does.

FID: Heusel et al. 2017 (arXiv:1706.08500); clean resizing: Parmar et al. 2022 (arXiv:2104.11222). The network is the
TorchScript translation of the original TensorFlow graph that clean-fid and StyleGAN use. Only distances from this very
file are called FID: clean-fid checks no hash and keeps half a download, so the hash is checked here.
"""

from __future__ import annotations

import platform
import warnings
from pathlib import Path

import torch
from torch import Tensor

from eval.judges import Description, Judge
from eval.judges.images import check_batch, in_batches, resized
from eval.judges.weights import Published, find, given, is_torchscript

FILE = "inception-2015-12-05.pt"
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE}"
# As k-diffusion pins it (k_diffusion/evaluation.py, github.com/crowsonkb/k-diffusion).
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
CLEANFID = Path("./" if platform.system() == "Windows" else "/tmp")  # hard-coded there (cleanfid/features.py)
SIZE, WIDTH = 299, 2048
BATCH = 32


def published() -> Published:
    """The file of clean-fid, in clean-fid's folder or in PyTorch's, which a reboot leaves alone."""
    return Published("Inception v3", URL, SHA256, (CLEANFID / FILE, Path(torch.hub.get_dir()) / "checkpoints" / FILE))


class InceptionJudge(Judge):
    """Features of the last pooling layer, [B, 2048].

    Args:
        device: where it runs.
        weights: a TorchScript archive of the same interface; None: the published file from the caches. Distances are
            called FID only with the published file.

    Raises:
        MissingWeights: no such file.
        ValueError: the file is no such network, or the cached one has another hash.
    """

    name = "inception"
    options = ("weights",)

    def __init__(self, device: str | torch.device = "cpu", weights: str | None = None) -> None:
        super().__init__(self.description(weights), device)
        path = (given(self.name, weights) if weights else find(self.name, published())).path
        self.layers = _load(path, self.device)

    @classmethod
    def description(cls, weights: str | None = None) -> Description:
        """What is known without loading the network."""
        file = given(cls.name, weights, published()) if weights else find(cls.name, published())
        name = "FID" if file.verified else "FD-Inception (unverified weights)"
        return Description(
            file.sha256,
            name,
            f"clean-fid-clean-{SIZE}",
            WIDTH,
            verified=file.verified,
            record={"weights_file": file.path.name, "weights_url": URL},
        )

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """Float images [B, 3, H, W] in [-1, 1], any H and W -> float32 [B, 2048].

        Raises:
            ValueError: see ``eval.judges.images.check_batch``.
        """
        check_batch(images)
        return in_batches(self._network, images, BATCH)

    def _network(self, images: Tensor) -> Tensor:
        return _features(self.layers, resized(images.to(self.device), SIZE))


def _features(layers: torch.nn.Module, images: Tensor) -> Tensor:
    pixels = (images + 1) * 127.5
    return layers((pixels - 128) / 128).view(len(images), WIDTH)  # the range that clean-fid gives it


def _load(path: Path, device: torch.device) -> torch.nn.Module:
    """``layers`` of the archive, tried on two grey images.

    Raises:
        ValueError: not a TorchScript archive, or not one that gives 2048 features an image.
    """
    if not is_torchscript(path):
        raise ValueError(f"judge inception: {path} is not a TorchScript archive, or half of one; {FILE} is needed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, and what this file is
            layers = torch.jit.load(path, map_location=device).eval().layers
        with torch.inference_mode():
            _features(layers, torch.zeros(2, 3, SIZE, SIZE, device=device))
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"judge inception: {path} does not turn images [N, 3, {SIZE}, {SIZE}] into features "
            f"[N, {WIDTH}] through `layers`, as {FILE} does: {str(error).splitlines()[0]}"
        ) from error
    return layers
