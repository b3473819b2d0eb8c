"""Where a pretrained CLIP text model's files are: a local folder, the hub cache, or the hub."""

from __future__ import annotations

from pathlib import Path

from iris.errors import SettingError
from iris.io.hub import no_answer

MODEL = ("config.json", "model.safetensors")
WORDS = ("vocab.json", "merges.txt")  # tokenizer.json holds both
NOWHERE = "neither a folder nor in the hub cache"
TOKENIZER = ("tokenizer.json", *WORDS, "tokenizer_config.json", "special_tokens_map.json")


def locate(source: str) -> tuple[Path, Path]:
    """The folders of the model's and of the tokenizer's files.

    ``source`` is a folder or a hub name, of one model or of a diffusers pipeline (then text_encoder/ and tokenizer/ in
    it). The hub is asked only for what neither a folder nor the cache has, and never while HF_HUB_OFFLINE is set.

    Raises:
        SettingError: files are missing, with their names and where they may be put.
    """
    from huggingface_hub import constants

    root = Path(source).expanduser()
    if not root.is_dir():
        root = _cached(source)
        if (root is None or _missing(root)) and not constants.HF_HUB_OFFLINE:
            root = _download(source)
    if root is None:
        raise SettingError(explain(source, f"{NOWHERE}, and HF_HUB_OFFLINE forbids a download"))
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


def _cached(source: str) -> Path | None:
    """The repository's folder in the hub cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for inside in ("text_encoder/config.json", "config.json"):
        try:
            found = try_to_load_from_cache(source, inside)
        except HFValidationError as error:
            raise SettingError(explain(source, "neither a folder nor a hub name")) from error
        if isinstance(found, str):
            return Path(found).parents[inside.count("/")]
    return None


def _download(source: str) -> Path:
    """Fetch the files that are needed, and no others, into the hub cache."""
    import huggingface_hub

    wanted = [*MODEL, *TOKENIZER]
    wanted += [f"text_encoder/{name}" for name in MODEL] + [f"tokenizer/{name}" for name in TOKENIZER]
    if problem := no_answer(source):
        raise SettingError(explain(source, f"{NOWHERE}, and the hub gave {problem!r}")) from problem
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted))
    except Exception as error:  # the client's own errors and those of whichever HTTP library it uses
        raise SettingError(explain(source, f"{NOWHERE}, and the hub gave {error!r}")) from error
