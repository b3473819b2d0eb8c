"""Which files a pretrained CLIP text model has: in a local folder, in the hub cache, or on the hub."""

from __future__ import annotations

from pathlib import Path

from iris.errors import SettingError
from iris.io.hub import cached, fetch, is_hub_name

MODEL = ("config.json", "model.safetensors")
WORDS = ("vocab.json", "merges.txt")  # tokenizer.json holds both
TOKENIZER = ("tokenizer.json", *WORDS, "tokenizer_config.json", "special_tokens_map.json")


def locate(source: str) -> tuple[Path, Path]:
    """The folders of the model's and of the tokenizer's files.

    ``source`` is a folder or a hub name, of one model or of a diffusers pipeline (then text_encoder/ and tokenizer/ in
    it). The hub is asked only for what neither a folder nor the cache has, and never while HF_HUB_OFFLINE is set.

    Raises:
        SettingError: files are missing, with their names and where they may be put.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        if not is_hub_name(source):
            raise SettingError(explain(source, "neither a folder nor a hub name"))
        root = cached(source, ("text_encoder/config.json", "config.json"))
        if root is None or _missing(root):
            wanted = [*MODEL, *TOKENIZER]
            wanted += [f"text_encoder/{name}" for name in MODEL] + [f"tokenizer/{name}" for name in TOKENIZER]
            nowhere = "neither a folder nor in the hub cache"
            root = fetch(source, wanted, lambda why: explain(source, f"{nowhere}, and {why}"))
    if missing := _missing(root):
        raise SettingError(explain(source, f"{root} lacks {', '.join(missing)}"))
    return _parts(root)


def explain(source: str, problem: str) -> str:
    """The message of an error about model.text_source: what is wrong and what is expected."""
    from huggingface_hub import constants

    return (
        f"model.text_source={source!r}: {problem}. Expected: a folder with {', '.join((*MODEL, *WORDS))} "
        "(tokenizer.json may replace the last two); a diffusers pipeline's folder with these in text_encoder/ and "
        f"tokenizer/; or the hub name of either, in the cache ({constants.HF_HUB_CACHE}) or to be downloaded"
    )


def _parts(root: Path) -> tuple[Path, Path]:
    pipeline = (root / "text_encoder").is_dir()
    return (root / "text_encoder", root / "tokenizer") if pipeline else (root, root)


def _missing(root: Path) -> list[str]:
    model, tokenizer = _parts(root)
    needed = [model / name for name in MODEL]
    if not (tokenizer / "tokenizer.json").exists():
        needed += [tokenizer / name for name in WORDS]
    return [str(path.relative_to(root)) for path in needed if not path.exists()]
