"""Judge ``dinov2``: the class token of DINOv2, whose Fréchet distance is FD-DINOv2.

DINOv2: Oquab et al. 2023 (arXiv:2304.07193). FD-DINOv2 is its ViT-L/14 at 224 x 224 (Stein et al. 2023,
arXiv:2306.04675; Karras et al. 2024, arXiv:2312.02696). timm holds the network; the table of positions, learned at
518 x 518, is resized as Meta's own code does, which timm does not: else the features would be others than published.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.judges import Description, Judge
from eval.judges.images import check_batch, in_batches, resized
from eval.judges.weights import Published, WeightsFile, find, given
from iris.errors import SettingError

SIDE = 224
BATCH = 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Size:
    """One of the four networks: its letter in Meta's file names, width D, and the sha256 of Meta's file."""

    letter: str
    width: int
    sha256: str


# sha256 as refiners pins them (src/refiners/conversion/models/dinov2.py, github.com/finegrain-ai/refiners).
SIZES = {
    "small": Size("s", 384, "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "base": Size("b", 768, "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "large": Size("l", 1024, "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "giant": Size("g", 1536, "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3"),
}


def published(model: str) -> Published:
    """Meta's file, in the folder where torch.hub puts it, and timm's copy on the Hub."""
    size = SIZES[model]
    file = f"dinov2_vit{size.letter}14_pretrain.pth"
    url = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{size.letter}14/{file}"
    return Published(
        f"DINOv2 {model}",
        url,
        size.sha256,
        (Path(torch.hub.get_dir()) / "checkpoints" / file,),
        ((f"timm/vit_{model}_patch14_dinov2.lvd142m", "model.safetensors"),),
    )


class DINOv2Judge(Judge):
    """Normalised class token, [B, D]: 1024 wide for the large network, which FD-DINOv2 means.

    Args:
        device: where it runs.
        weights: Meta's .pth file or timm's model.safetensors, or the folder of the latter; None: from the caches.
        model: small, base, large or giant.

    Raises:
        SettingError: no such size, or the weights are another size's.
        MissingWeights: no such file.
        ValueError: the file holds other weights, or the cached one has another hash.
    """

    name = "dinov2"
    options = ("weights", "model")

    def __init__(self, device: str | torch.device = "cpu", weights: str | None = None, model: str = "large") -> None:
        super().__init__(self.description(weights, model), device)
        self.network = _load(_file(weights, model).path, model).to(self.device)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
        )

    @classmethod
    def description(cls, weights: str | None = None, model: str = "large") -> Description:
        """What is known without loading the network."""
        if model not in SIZES:
            raise SettingError(f"judge dinov2: judge.model={model!r} is unknown; allowed: {', '.join(SIZES)}")
        file = _file(weights, model)
        details = ([] if model == "large" else [model]) + ([] if file.verified else ["unverified weights"])
        name = "FD-DINOv2" + (f" ({', '.join(details)})" if details else "")
        record = {"model": model, "weights_file": file.path.name, "weights_url": published(model).url}
        return Description(
            file.sha256, name, f"bicubic-antialias-{SIDE}", SIZES[model].width, verified=file.verified, record=record
        )

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """Float images [B, 3, H, W] in [-1, 1], any H and W -> float32 [B, D].

        Raises:
            ValueError: see ``eval.judges.images.check_batch``.
        """
        check_batch(images)
        return in_batches(self._network, images, BATCH)

    def _network(self, images: Tensor) -> Tensor:
        pixels = (resized(images.to(self.device), SIDE) + 1) / 2
        return self.network((pixels - self.mean) / self.std)


def _file(weights: str | None, model: str) -> WeightsFile:
    if weights is None:
        return find("dinov2", published(model))
    path = Path(weights).expanduser()
    file = given("dinov2", path / "model.safetensors" if path.is_dir() else path, published(model))
    for other, size in SIZES.items():
        if other != model and file.sha256 == size.sha256:
            raise SettingError(f"judge dinov2: judge.weights={path} is of size {other}, judge.model={model}")
    return file


def _load(path: Path, model: str) -> nn.Module:
    """timm's network with the weights of a file.

    Raises:
        ValueError: the file holds no tensors, or those of another network.
    """
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    with torch.device("meta"):  # no time and no random numbers for values that are replaced
        network = timm.create_model(f"vit_{model}_patch14_dinov2", pretrained=False, img_size=SIDE)
    state = _tensors(path)
    try:
        state["pos_embed"] = resized_positions(state["pos_embed"], SIDE // 14)
        network.load_state_dict(checkpoint_filter_fn(state, network), assign=True)
    except (KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[:2]
        raise ValueError(
            f"judge dinov2: {path} does not hold the {model} network as Meta's .pth or timm's "
            f".safetensors do: {' '.join(reason)}"
        ) from error
    return network.float().eval().requires_grad_(False)


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a file of another kind makes torch.load fail in many ways, KeyError too
        raise ValueError(f"judge dinov2: {path} holds no weights: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"judge dinov2: {path} holds no table of tensors")
    return state


def resized_positions(table: Tensor, side: int) -> Tensor:
    """Learned positions [1, 1 + M * M, D] -> [1, 1 + side * side, D]; the first, the class token's, stays.

    As Meta's ``interpolate_pos_encoding``: bicubic, not antialiased, and at the scale (side + 0.1) / M, their guard
    against rounding, which shifts every sample a little.
    """
    old = round((table.shape[1] - 1) ** 0.5)
    if old == side:
        return table
    grid = table[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / old, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
