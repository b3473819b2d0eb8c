"""Where captioned images come from; every source is an HF ``DatasetDict`` with the same columns.

Columns: image (``datasets.Image``), caption (string), row (number in the source's files or in the drawn split), and for
the drawn worlds one ``ClassLabel`` an attribute. Adding a source is one function and one line in ``SOURCES``.
"""

from __future__ import annotations

import glob
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iris.data import shapes, shapes2
from iris.data.raster import key_of, mix
from iris.data.world import World
from iris.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import datasets

WORLDS: dict[str, World] = {world.name: world for world in (shapes.WORLD, shapes2.WORLD)}
WORLD_COUNTS = {"train": 16_384, "validation": 4_096, "heldout": 1_024}
VALIDATION_SHARE = 0.1  # of the rows of files that bring no validation split
BLOCK_BYTES, BLOCKS = 1 << 16, 16  # a file's fingerprint reads 16 blocks of 64 KiB
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class Request:
    """What ``load`` was asked for; see there."""

    name: str
    path: str | None
    size: int | None
    image_column: str
    text_column: str
    labels: tuple[str, ...] | None
    train: int | None
    validation: int | float | None
    heldout: int | None
    seed: int


def load(
    name: str,
    *,
    path: str | Path | None = None,
    size: int | None = None,
    image_column: str = "image",
    text_column: str = "text",
    labels: Sequence[str] | None = None,
    train: int | None = None,
    validation: int | float | None = None,
    heldout: int | None = None,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Captioned images as an HF ``DatasetDict`` with the splits train, validation and, for drawn worlds, heldout.

    Args:
        name: one of ``SOURCES``.
        path: for files: a file, a folder or a glob (parquet), a folder (folder).
        size: side in pixels that a drawn world is drawn at (None: its own); files keep their sizes until ``pixels``.
        image_column, text_column: names in the files (for folder, the images are always "image").
        labels: names of the classes, when the text column holds bare integers.
        train: pictures of the split; None: 16,384 drawn ones, or all there are in the files (which it only limits).
        validation: pictures of the split, or a share of the rows between 0 and 1; None: 4,096 drawn ones, or every row
            of the files' own validation (else test) split, or a tenth of the rows, chosen by a fixed hash.
        heldout: pictures of that split of a drawn world (None: 1,024); files have none.
        seed: of a drawn world's pictures.

    Raises:
        SettingError: a setting cannot be used; the message names it and what is allowed.
    """
    request = _request(
        name,
        path=path,
        size=size,
        image_column=image_column,
        text_column=text_column,
        labels=labels,
        train=train,
        validation=validation,
        heldout=heldout,
        seed=seed,
    )
    return SOURCES[name](request)


def fingerprint(name: str, **settings: Any) -> str:
    """16 hex digits of what determines the data: ``load``'s settings, a world's version, or the files' contents.

    Files count by relative name, size and sampled content, never by place or time, so a copied folder has the same
    fingerprint. Takes the settings of ``load``.

    Raises:
        SettingError: as ``load``.
    """
    request = _request(name, **settings)
    facts = {key: value for key, value in asdict(request).items() if key != "path"}
    if name in WORLDS:
        facts = {key: facts[key] for key in ("name", "size", "seed", *WORLD_COUNTS)}
        facts["size"] = request.size or WORLDS[name].size
        facts.update({split: _count(request, split) for split in WORLD_COUNTS}, version=WORLDS[name].version)
        return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:16]
    root = _existing(request)
    files = _parquet_files(request) if name == "parquet" else sorted(p for p in root.rglob("*") if p.is_file())
    base = root if root.is_dir() else files[0].parent
    digest = hashlib.sha256(repr(sorted(facts.items())).encode())
    for file in files:
        relative = file.relative_to(base).as_posix() if file.is_relative_to(base) else file.name
        digest.update(f"{relative}\x1f{file.stat().st_size}\x1f".encode() + _content_sample(file))
    return digest.hexdigest()[:16]


def _request(name: str, **settings: Any) -> Request:
    """The settings of ``load`` checked and completed."""
    if name not in SOURCES:
        raise SettingError(f"data must be one of {', '.join(SOURCES)}, not '{name}'")
    defaults = {
        "path": None,
        "size": None,
        "image_column": "image",
        "text_column": "text",
        "labels": None,
        "train": None,
        "validation": None,
        "heldout": None,
        "seed": 0,
    }
    unknown = sorted(set(settings) - set(defaults))
    if unknown:
        raise SettingError(f"data.{unknown[0]} is no setting; there are {', '.join(defaults)}")
    given = {**defaults, **settings}
    for split in WORLD_COUNTS:
        value = given[split]
        if value is not None and (
            value < 0 or (isinstance(value, float) and not (split == "validation" and value < 1))
        ):
            share = ", or for files a share between 0 and 1" if split == "validation" else ""
            raise SettingError(f"data.{split} must be a count >= 0{share}, not {value}")
    given["path"] = None if given["path"] is None else str(given["path"])
    given["labels"] = None if given["labels"] is None else tuple(given["labels"])
    return Request(name=name, **given)


def _count(request: Request, split: str) -> int:
    """Pictures of a drawn split."""
    value = getattr(request, split)
    if isinstance(value, float):
        raise SettingError(f"data.{split} of the drawn world {request.name} must be a count, not the share {value}")
    return WORLD_COUNTS[split] if value is None else value


# Drawn worlds ------------------------------------------------------------------------------------------------------


def _drawn(request: Request) -> datasets.DatasetDict:
    import datasets as hf

    world = WORLDS[request.name]
    features = hf.Features(
        {
            "image": hf.Image(),
            "caption": hf.Value("string"),
            "row": hf.Value("int64"),
            **{name: hf.ClassLabel(names=list(values)) for name, values in world.attributes.items()},
        }
    )
    splits = {}
    for split in WORLD_COUNTS:
        pictures = world.draw(split, _count(request, split), request.seed, size=request.size)
        columns = {
            "image": [{"bytes": _png(image), "path": None} for image in pictures.images],
            "caption": pictures.captions,
            "row": np.arange(len(pictures.captions)),
            **pictures.attributes,
        }
        splits[split] = hf.Dataset.from_dict(columns, features=features)
    return hf.DatasetDict(splits)


def _png(image: np.ndarray) -> bytes:
    """Lossless bytes of a uint8 [H, W, 3] picture."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


# Files -------------------------------------------------------------------------------------------------------------


def _parquet(request: Request, extra: Mapping[str, str] | None = None) -> datasets.DatasetDict:
    root, files = _existing(request), _parquet_files(request)
    by_split: dict[str, list[str]] = {}
    for file in files:
        split = _split_of(file.relative_to(root)) if len(files) > 1 else "train"
        by_split.setdefault(split, []).append(str(file))
    return _from_files(request, "parquet", extra, data_files=by_split)


def _folder(request: Request, extra: Mapping[str, str] | None = None) -> datasets.DatasetDict:
    root = _existing(request)
    if not root.is_dir():
        raise SettingError(f"data.path must be a folder of images with metadata.csv or metadata.jsonl, not {root}")
    if not any(next(root.rglob(name), None) for name in METADATA):
        raise SettingError(
            f"data.path: {root} has no metadata.csv or metadata.jsonl (columns file_name and "
            f"{request.text_column}) that gives the captions"
        )
    return _from_files(request, "imagefolder", extra, data_dir=str(root))


SOURCES: dict[str, Callable[..., datasets.DatasetDict]] = {
    "shapes": _drawn,
    "shapes2": _drawn,
    "parquet": _parquet,
    "folder": _folder,
}


def _existing(request: Request) -> Path:
    """The path, or for a glob its fixed part.

    Raises:
        SettingError: no path given, or nothing there.
    """
    if not request.path:
        raise SettingError(f"data.path is needed with data={request.name}: the files to read")
    path = Path(request.path).expanduser()
    if not path.exists() and glob.has_magic(request.path):
        fixed = Path(*list(path.parts[: next(i for i, p in enumerate(path.parts) if glob.has_magic(p))]))
        path = fixed
    if not path.exists():
        raise SettingError(f"data.path does not exist: {request.path}")
    return path


def _parquet_files(request: Request) -> list[Path]:
    root = _existing(request)
    if root.is_file():
        return [root]
    pattern = str(Path(request.path).expanduser())
    found = glob.glob(pattern, recursive=True) if glob.has_magic(pattern) else root.rglob("*.parquet")
    files = sorted(Path(file) for file in found if Path(file).is_file())
    if not files:
        raise SettingError(f"data.path has no parquet files: {request.path}")
    return files


def _split_of(file: Path) -> str:
    """train, validation or test, from a word of the file's name or else of its folder's; ``file`` is relative to
    data.path, since a folder that happens to be called test further up says nothing about the split."""
    for text in (file.stem, file.parent.name):
        words = re.split(r"[^a-z]+", text.lower())
        for split, names in {"validation": ("validation", "valid", "val"), "test": ("test",)}.items():
            if any(word in names for word in words):
                return split
    return "train"


def _from_files(request: Request, builder: str, extra: Mapping[str, str] | None, **where: Any) -> datasets.DatasetDict:
    import datasets as hf

    try:
        with _quiet():
            splits = hf.load_dataset(builder, **where)
    except Exception as error:  # HF wraps a bad file's error in its own kinds, several deep
        cause = error.__cause__ or error
        raise SettingError(f"data.path: {request.path} cannot be read as {request.name}: {cause}") from error
    return arrange(request, splits, extra)


def arrange(
    request: Request, splits: Mapping[str, datasets.Dataset], extra: Mapping[str, str] | None = None
) -> datasets.DatasetDict:
    """Splits as they were read -> train and validation with the columns of every source; see ``load``.

    ``extra``: further columns, wanted name -> name in the files.

    Raises:
        SettingError: no train split, a column that is missing or of the wrong kind, or no row left to train on.
    """
    import datasets as hf

    if "train" not in splits:
        raise SettingError(f"data.path: {request.path} has only the splits {', '.join(splits)}; train is needed")
    splits = {name: _with_columns(request, part, extra or {}) for name, part in splits.items()}
    own = splits.get("validation", splits.get("test"))
    train, rows = splits["train"], len(splits["train"])
    # A row's place in this order depends on its number alone, so that the same rows validate in every trial.
    order = np.argsort(mix(np.arange(rows, dtype=np.uint64) + key_of("files", "validation")), kind="stable")
    wanted = request.validation
    if own is not None:
        limit = len(own) if wanted is None else round(wanted * len(own)) if isinstance(wanted, float) else wanted
        return hf.DatasetDict(
            {
                "train": _limited(train, np.arange(rows), request.train),
                "validation": _limited(own, np.arange(len(own)), limit),
            }
        )
    wanted = VALIDATION_SHARE if wanted is None else wanted
    count = max(round(wanted * rows), 1) if isinstance(wanted, float) else wanted
    if count >= rows:
        raise SettingError(
            f"data.validation takes {count} of the {rows} rows of {request.path} and leaves none to "
            "train on; give a smaller count or a share such as 0.1"
        )
    return hf.DatasetDict(
        {"train": _limited(train, order[count:], request.train), "validation": _limited(train, order[:count], None)}
    )


def _limited(dataset: datasets.Dataset, rows: np.ndarray, limit: int | None) -> datasets.Dataset:
    """The first ``limit`` of ``rows`` (all, if None), in the order of the files."""
    return dataset.select(np.sort(rows[:limit]))


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of HF's own: the terminal belongs to the program's progress."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _with_columns(request: Request, dataset: datasets.Dataset, extra: Mapping[str, str]) -> datasets.Dataset:
    """The source's columns renamed and checked: image, caption, row, and those of ``extra``."""
    import datasets as hf

    image = "image" if request.name == "folder" else request.image_column
    further = [(f"{name}_column", column) for name, column in extra.items()]
    for setting, column in (("image_column", image), ("text_column", request.text_column), *further):
        if column not in dataset.column_names:
            raise SettingError(
                f"data.{setting}: {request.path} has no column '{column}'; its columns are "
                f"{', '.join(dataset.column_names)}"
            )
    kind = dataset.features[image]
    if not (
        isinstance(kind, hf.Image)
        or (isinstance(kind, dict) and "bytes" in kind)
        or getattr(kind, "dtype", None) in ("binary", "large_binary")
    ):
        raise SettingError(f"data.image_column: column '{image}' of {request.path} holds {kind}, not images")
    captions = _captions(request, dataset)
    columns = {name: (list(dataset[column]), dataset.features[column]) for name, column in extra.items()}
    dataset = dataset.select_columns([image])
    if image != "image":
        dataset = dataset.rename_column(image, "image")
    dataset = dataset.cast_column("image", hf.Image())
    dataset = dataset.add_column("caption", captions, feature=hf.Value("string")).add_column(
        "row", np.arange(len(captions)), feature=hf.Value("int64")
    )
    for name, (values, feature) in columns.items():
        dataset = dataset.add_column(name, values, feature=feature)
    return dataset


def _captions(request: Request, dataset: datasets.Dataset) -> list[str | None]:
    """The text column as strings; class numbers become class names."""
    import datasets as hf

    kind, values = dataset.features[request.text_column], dataset[request.text_column]
    if getattr(kind, "dtype", None) in ("string", "large_string"):
        return list(values)
    names = kind.names if isinstance(kind, hf.ClassLabel) else request.labels
    if not str(getattr(kind, "dtype", "")).startswith(("int", "uint")):
        raise SettingError(
            f"data.text_column: column '{request.text_column}' of {request.path} holds {kind}; strings, "
            "class labels or integers are needed"
        )
    if names is None:
        raise SettingError(
            f"data.labels is needed: column '{request.text_column}' of {request.path} holds bare integers"
        )
    wrong = next((value for value in values if value is not None and not 0 <= value < len(names)), None)
    if wrong is not None:
        raise SettingError(f"data.labels has {len(names)} names, but column '{request.text_column}' holds {wrong}")
    return [None if value is None else names[value] for value in values]


def _content_sample(file: Path) -> bytes:
    """sha256 of up to 16 evenly spaced 64 KiB blocks, the first and the last included: all of a file up to 1 MiB."""
    size, digest = file.stat().st_size, hashlib.sha256()
    starts = (
        range(0, size, BLOCK_BYTES)
        if size <= BLOCK_BYTES * BLOCKS
        else [(size - BLOCK_BYTES) * i // (BLOCKS - 1) for i in range(BLOCKS)]
    )
    with file.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            digest.update(stream.read(BLOCK_BYTES))
    return digest.digest()
