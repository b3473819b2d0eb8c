"""LPIPS (arXiv 1801.03924): how different two images look, by the features of a network that classifies images.

The backbone's weights are torchvision's and are never downloaded here; the linear heads come with torchmetrics.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from iris.errors import SettingError
from iris.settings import check, setting

# Mean and standard deviation of ImageNet, for images in [-1, 1], as LPIPS rounds them.
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
TINY = 1e-8
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
)


class Net(NamedTuple):
    """A backbone: torchvision's names of it and of its weights, the layers read out, the smallest image side."""

    model: str
    weights: str
    outputs: tuple[int, ...]
    smallest: int


NETS = {
    "vgg": Net("vgg16", "VGG16_Weights", (3, 8, 15, 22, 29), 16),
    "alex": Net("alexnet", "AlexNet_Weights", (1, 4, 7, 9, 11), 31),
}


@dataclass(frozen=True)
class PerceptualOptions:
    """Settings perceptual.*: the LPIPS term of a VAE's loss.

    weight: of the term; 0 turns it off. LDM has 1 beside a mean absolute error.
    net: ``vgg`` (LDM's) or ``alex``.
    source: file with the backbone's weights, as torchvision publishes them (.pth) or as .safetensors with the same
        names; None: torchvision's file name in torch.hub's folder, where torchvision itself puts it.
    """

    weight: float = setting(0.0, "of the LPIPS term; 0: none", low=0)
    net: str = setting("vgg", "the backbone", choices=tuple(NETS))
    source: str | None = setting(None, "a file with its weights; null: where torchvision keeps them")

    def __post_init__(self) -> None:
        check(self, "perceptual")

    def require_size(self, height: int, width: int) -> None:
        """Raise a SettingError if the backbone cannot take images of this size."""
        side, least = min(height, width), NETS[self.net].smallest
        if self.weight and side < least:
            others = ", ".join(name for name, net in NETS.items() if net.smallest <= side) or "none"
            raise SettingError(
                f"perceptual.net={self.net} needs images of at least {least}x{least}, not "
                f"{height}x{width}; allowed: {others}"
            )


class LPIPS(nn.Module):
    """Distance of images [B, 3, H, W] in [-1, 1] (not clipped): a scalar, the mean over the batch. Frozen.

    Features of five layers, each position's scaled to length 1; squared differences weighted by channel, averaged over
    positions, added over layers.

    Args:
        features: the backbone's layers.
        outputs: after which of them features are read.
        heads: weights [1, C, 1, 1] of each of these.
    """

    frozen = True

    def __init__(self, features: nn.Sequential, outputs: tuple[int, ...], heads: list[Tensor]) -> None:
        super().__init__()
        self.features, self.outputs = features[: outputs[-1] + 1], outputs
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        self.heads = nn.ParameterList(heads)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Gradients go to ``images`` only."""
        with torch.no_grad():
            wanted = self._read(targets)
        layers = zip(self._read(images), wanted, self.heads, strict=True)
        return sum((head * (found - target).square()).sum(1).mean() for found, target, head in layers)

    def _read(self, images: Tensor) -> list[Tensor]:
        x, found = (images.to(self.mean.dtype) - self.mean) / self.std, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.outputs:
                found.append(x / (TINY + x.square().sum(1, keepdim=True)).sqrt())
        return found


def load_lpips(options: PerceptualOptions) -> LPIPS:
    """LPIPS with the backbone that ``options`` names; takes no random numbers and no network.

    Raises:
        SettingError: the file is not there or not the backbone's, or torchmetrics has no heads for it.
    """
    import torchvision

    net, path = NETS[options.net], backbone_file(options)
    with torch.device("meta"):  # neither draws nor holds the classifier: 120 M parameters that are not needed
        features = getattr(torchvision.models, net.model)(weights=None).features
    try:
        stored = {
            name.removeprefix("features."): value
            for name, value in _read_file(path).items()
            if name.startswith("features.")
        }
        features.load_state_dict(stored, assign=True)
    except UNREADABLE as error:
        reason = " ".join(str(error).split("\n")[:2])
        raise SettingError(f"perceptual.source: {path} does not hold torchvision's {net.model} ({reason})") from error
    return LPIPS(features.float(), net.outputs, _heads(options.net))


def backbone_file(options: PerceptualOptions) -> Path:
    """The file with the backbone's weights.

    Raises:
        SettingError: it is not there; the message says what it is called, where it is from and where to put it.
    """
    import torchvision

    net = NETS[options.net]
    url = getattr(torchvision.models, net.weights).IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    path = cached if options.source is None else Path(options.source).expanduser()
    if not path.is_file():
        given = " is not set" if options.source is None else f"={options.source!r} is no file"
        raise SettingError(
            f"perceptual.weight={options.weight} with perceptual.net={options.net} needs the weights of torchvision's "
            f"{net.model}, {cached.name}: perceptual.source{given}. Put the file ({url}) into {cached.parent}, or set "
            "perceptual.source to where it is; perceptual.weight=0 does without"
        )
    return path


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _heads(net: str) -> list[Tensor]:
    """The linear heads that torchmetrics carries, in the order of the layers."""
    place = files("torchmetrics.functional.image") / "lpips_models" / f"{net}.pth"
    try:
        stored = torch.load(Path(str(place)), map_location="cpu", weights_only=True)
        return [stored[f"lin{layer}.model.1.weight"] for layer in range(len(NETS[net].outputs))]
    except UNREADABLE as error:
        raise SettingError(f"perceptual.net={net}: torchmetrics lacks LPIPS's heads, {place} ({error})") from error
