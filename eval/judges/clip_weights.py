"""What ``judge.model`` and ``judge.weights`` of a CLIP mean: a network of open_clip and the file with its weights."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.judges.clip_tags import (
    PREPROCESS,
    QUICK,
    VIT_B_32,
    VIT_B_32_CONFIG,
    plain,
    tag_names,
    tag_of,
    tags_with,
    vit_b_32,
)
from eval.judges.weights import MissingWeights, WeightsFile, file_sha256, find, given, hub_file, is_torchscript
from iris.errors import SettingError
from iris.settings import suggestion

CONFIG = "open_clip_config.json"
# In the order in which open_clip itself looks for them.
FOLDER_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Source:
    """A network of open_clip and where its weights are.

    Attributes:
        model: as ``open_clip.create_model`` takes it.
        label: the same for people.
        path: the weights file.
        sha256: of it; of a folder, of configuration and weights, which both make the features.
        verified: whether the file is what was published under ``tag``.
        config: open_clip's model configuration.
        preprocess: mean, std, interpolation and resize_mode of its images.
        tag: open_clip's name of the weights, where they are known.
        folder: whether configuration and weights come from one folder.
    """

    model: str
    label: str
    path: Path
    sha256: str
    verified: bool
    config: dict[str, Any]
    preprocess: dict[str, Any]
    tag: str | None = None
    folder: bool = False

    @property
    def quick_gelu(self) -> bool:
        """Whether the activation is OpenAI's QuickGELU."""
        return bool(self.config.get("quick_gelu", False))

    @property
    def image_size(self) -> int:
        """Side of the square that the image tower takes."""
        size = self.config["vision_cfg"].get("image_size", 224)
        return size if isinstance(size, int) else size[0]


def find_source(judge: str, model: str | None, weights: str | None) -> Source:
    """The network and weights file that the settings mean.

    Args:
        judge: what errors call the judge.
        model: a name of open_clip, or None for a folder.
        weights: a tag of open_clip, a file or a folder.

    Raises:
        SettingError: an unknown model or tag; weights of another activation or network than ``model``.
        MissingWeights: no such file, or none in the caches.
        ValueError: a cached file has another hash.
    """
    if weights is None:
        raise SettingError(
            f"judge {judge}: set judge.weights to a tag of open_clip, a file or a folder, and "
            "judge.model to a name of open_clip, such as judge.model=ViT-L-14 "
            "judge.weights=laion2b_s32b_b82k"
        )
    place = Path(weights.removeprefix("local-dir:")).expanduser()
    if weights.startswith("local-dir:") or (model is None and place.is_dir()):
        return _of_folder(judge, model, place)
    if (model, weights) == (VIT_B_32, "openai"):
        tag = vit_b_32()
        return _source(model, VIT_B_32_CONFIG, find(judge, tag.file), tag.preprocess, tag.name)
    model, config = _known_model(judge, model)
    tag = tag_of(model, weights)
    if not tag and place.is_dir():
        return _of_folder(judge, model, place)
    _check_text_parts(judge, config["text_cfg"], tokeniser=True)
    if tag:
        _check_activation(judge, model, config, tag.quick_gelu, f"judge.weights={weights}")
        return _source(model, config, find(judge, tag.file), tag.preprocess, tag.name)
    if not place.is_file() and not place.suffix and os.sep not in weights:
        names = tag_names(model)
        raise SettingError(
            f"judge {judge}: judge.weights={weights!r} is neither a file nor a tag of {model}"
            f"{suggestion(weights, names)}; tags: {', '.join(names) or 'none'}"
        )
    return _of_file(judge, model, config, place)


def _of_file(judge: str, model: str, config: dict[str, Any], path: Path) -> Source:
    """A file: its hash may tell what it is; else the preprocessing is what all published weights of the model share."""
    file, setting = given(judge, path), f"judge.weights={path}"
    known = tags_with(file.sha256)
    tag = next((tag for tag in known if tag.model == plain(model)), None)
    if known and not tag:
        raise SettingError(f"judge {judge}: {setting} holds {known[0].model} ({known[0].name}), judge.model={model}")
    if tag:
        _check_activation(judge, model, config, tag.quick_gelu, f"{setting} ({tag.name})")
        return _source(model, config, WeightsFile(file.path, file.sha256, True), tag.preprocess, tag.name)
    if is_torchscript(path):
        _check_activation(judge, model, config, True, f"{setting} (a TorchScript archive, as only OpenAI's are)")
    choices = [tag_of(model, name).preprocess for name in tag_names(model)] or [PREPROCESS]
    if any(choice != choices[0] for choice in choices):
        raise SettingError(
            f"judge {judge}: weights of {model} were published with different preprocessing, and the "
            f"hash of {path} is not known; give the folder with {CONFIG} instead"
        )
    return _source(model, config, file, choices[0], None)


def _of_folder(judge: str, model: str | None, folder: Path) -> Source:
    if model is not None:
        raise SettingError(
            f"judge {judge}: judge.weights={folder} is a folder, which says itself what model it holds: "
            "use judge=clip and leave out judge.model"
        )
    files = [folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()]
    if not (folder / CONFIG).is_file() or not files:
        raise MissingWeights(
            f"judge {judge}: judge.weights={folder} must be a folder with {CONFIG} and {FOLDER_WEIGHTS[0]}"
        )
    content = (folder / CONFIG).read_bytes()
    try:
        stored = json.loads(content)
        config, preprocess = stored["model_cfg"], PREPROCESS | stored.get("preprocess_cfg", {})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"judge {judge}: {folder / CONFIG} is no configuration of open_clip: {error!r}") from error
    _check_text_parts(judge, config["text_cfg"], tokeniser=False)  # that lies in the folder
    parts = hashlib.sha256(content).hexdigest() + file_sha256(files[0])
    sha256 = hashlib.sha256(parts.encode()).hexdigest()
    return Source(
        f"local-dir:{folder}",
        folder.name,
        files[0],
        sha256,
        False,
        config,
        {key: preprocess[key] for key in PREPROCESS},
        folder=True,
    )


def _source(
    model: str, config: dict[str, Any], file: WeightsFile, preprocess: dict[str, Any], tag: str | None
) -> Source:
    return Source(model, model, file.path, file.sha256, file.verified, config, preprocess, tag)


def _known_model(judge: str, model: str | None) -> tuple[str, dict[str, Any]]:
    import open_clip

    if model is None:
        raise SettingError(f"judge {judge}: set judge.model to a name of open_clip, such as ViT-L-14")
    name = model.replace("/", "-")  # OpenAI's spelling
    config = open_clip.get_model_config(name)
    if config is None:
        close = suggestion(name, open_clip.list_models())
        raise SettingError(
            f"judge {judge}: judge.model={model!r} is not a model of open_clip{close}; "
            "python -c 'import open_clip; print(open_clip.list_models())' lists them"
        )
    return name, config


def _check_activation(judge: str, model: str, config: dict[str, Any], quick: bool, what: str) -> None:
    """Raise where open_clip has the model with the activation of the weights, and another is set: it warns at most."""
    import open_clip

    right = plain(model) + QUICK if quick else plain(model)
    if bool(config.get("quick_gelu", False)) != quick and right != model and open_clip.get_model_config(right):
        raise SettingError(
            f"judge {judge}: {what} was trained {'with' if quick else 'without'} QuickGELU; set judge.model={right}"
        )


def _check_text_parts(judge: str, text: dict[str, Any], tokeniser: bool) -> None:
    """Raise unless what open_clip takes from the Hub for some text towers is in the cache: it would ask the network."""
    wanted = [(text.get("hf_model_name"), "config.json")]
    wanted += [(text.get("hf_tokenizer_name"), "tokenizer_config.json")] if tokeniser else []
    for repository, name in wanted:
        if repository and not hub_file(repository, name):
            raise MissingWeights(
                f"judge {judge}: the text tower needs {name} of {repository}, which is not in the "
                f"cache of the Hugging Face Hub; get it by `hf download {repository}`"
            )
