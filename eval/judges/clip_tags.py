"""The weights that open_clip offers by tag: its own table, read without downloading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.judges.weights import Published

PREPROCESS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}  # of OpenAI, and open_clip's default
QUICK = "-quickgelu"
# The network of the CLIP score, as open_clip's tables have it, so that a plan does not wait seconds to import them.
VIT_B_32 = "ViT-B-32-quickgelu"
VIT_B_32_CONFIG = {
    "embed_dim": 512,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
VIT_B_32_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"


@dataclass(frozen=True)
class Tag:
    """Weights of an open_clip model.

    Attributes:
        model: without the suffix for QuickGELU.
        name: such as openai or laion2b_s34b_b79k.
        file: where they can be had.
        quick_gelu: whether they were trained with OpenAI's QuickGELU.
        preprocess: mean, std, interpolation and resize_mode of their images.
    """

    model: str
    name: str
    file: Published
    quick_gelu: bool
    preprocess: dict[str, Any]


def vit_b_32() -> Tag:
    """OpenAI's ViT-B/32."""
    url = f"https://openaipublic.azureedge.net/clip/models/{VIT_B_32_SHA256}/ViT-B-32.pt"
    hub = "timm/vit_base_patch32_clip_224.openai/"
    return _tag(VIT_B_32, "openai", {"url": url, "hf_hub": hub, "quick_gelu": True})


def plain(model: str) -> str:
    """A model's name without the suffix for QuickGELU."""
    return model.removesuffix(QUICK)


def tag_names(model: str) -> list[str]:
    """Tags of a model, as open_clip lists them."""
    import open_clip

    return open_clip.list_pretrained_tags_by_model(model)


def tag_of(model: str, name: str) -> Tag | None:
    """A tag of the model, of either activation: the plain model's table holds both."""
    import open_clip

    entry = open_clip.get_pretrained_cfg(model, name) or open_clip.get_pretrained_cfg(plain(model), name)
    return _tag(model, name, entry) if entry else None


def tags_with(sha256: str) -> list[Tag]:
    """The tags whose file has this hash."""
    import open_clip

    tags = (tag_of(model, name) for model, name in open_clip.list_pretrained() if not model.endswith(QUICK))
    return [tag for tag in tags if tag.file.sha256 and sha256.startswith(tag.file.sha256)]


def _tag(model: str, name: str, entry: dict[str, Any]) -> Tag:
    name, url = name.lower().replace("-", "_"), entry.get("url", "")  # as open_clip spells it
    places = (Path("~/.cache/clip").expanduser() / url.rpartition("/")[2],) if url else ()
    file = Published(f"{model} ({name})", url, _stated_sha256(url), places, _hub_files(entry.get("hf_hub", "")))
    preprocess = {key: entry.get(key, value) for key, value in PREPROCESS.items()}
    return Tag(plain(model), name, file, bool(entry.get("quick_gelu", False)), preprocess)


def _stated_sha256(url: str) -> str:
    """sha256 that a URL states, in full (OpenAI's) or its first digits (open_clip's), as open_clip reads it."""
    if "openaipublic" in url:
        return url.split("/")[-2]
    return Path(url).stem.rpartition("-")[2] if "mlfoundations" in url else ""


def _hub_files(entry: str) -> tuple[tuple[str, str], ...]:
    """(repository, file) of "owner/name/" or "owner/name/file", the .safetensors first, as open_clip takes it."""
    repository, _, name = entry.rpartition("/")
    if not repository:
        return ()
    if not name:
        names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    elif name.endswith((".bin", ".pth")):
        names = (f"{Path(name).stem}.safetensors", name)
    else:
        names = (name,)
    return tuple((repository, name) for name in names)
