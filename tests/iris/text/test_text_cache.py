"""Captions embedded on disk: equal to live encodings, never half written, never silently damaged."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from small_clip import save_clip
from torch import nn

from iris.errors import SettingError
from iris.nn.condition import TextCondition
from iris.randomness import initialise
from iris.text import CLIPText, EmbeddedText, TextEncoder, Vocabulary, WordEncoder, build_text_encoder, embed_captions
from iris.text import cache as module

CAPTIONS = ["two stars", "a red circle", "a circle", "a blue square on green", "a circle", ""]
UNIQUE = ["", "a blue square on green", "a circle", "a red circle", "two stars"]
FILES = ["tokens.npy", "mask.npy", "pooled.npy", "captions.json"]


def words(seed=0, length=6):
    return initialise(WordEncoder(Vocabulary.from_captions(CAPTIONS, length), 8, 1, 2), seed)


@pytest.fixture(params=["words", "clip"])
def encoder(request, tmp_path):
    return words() if request.param == "words" else CLIPText(str(save_clip(tmp_path / "clip")))


def live(encoder, captions):
    with torch.no_grad():
        return encoder(encoder.tokenise(captions))


class Scaled(TextEncoder):
    """An encoder whose values are all its one weight."""

    def __init__(self, scale, length=1, width=1):
        super().__init__()
        self.length, self.width = length, width
        self.scale = nn.Parameter(torch.tensor([scale]))

    def tokenise(self, captions):
        return torch.zeros(len(captions), self.length, dtype=torch.int64)

    def forward(self, numbers):
        tokens = self.scale.expand(*numbers.shape, self.width)
        return TextCondition(tokens, torch.ones_like(numbers, dtype=torch.bool), tokens[:, 0])

    def to_dict(self):
        return {"name": "scaled"}


class Slow(WordEncoder):
    """A word encoder that counts its calls, or raises in one of them."""

    calls, fails_at = 0, None

    def forward(self, numbers):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return super().forward(numbers)


def slow(fails_at=None):
    encoder = initialise(Slow(Vocabulary.from_captions(CAPTIONS, 6), 8, 1, 2), 0)
    encoder.fails_at = fails_at
    return encoder


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_float32_equals_live_encoding_exactly(encoder, tmp_path):
    text = EmbeddedText(embed_captions(encoder, CAPTIONS, tmp_path, dtype="float32"))
    numbers = text.tokenise(UNIQUE)
    assert numbers.tolist() == [[0], [1], [2], [3], [4]] and numbers.dtype == torch.int64
    for cached, expected in zip(text(numbers), live(encoder, UNIQUE), strict=True):
        assert cached.dtype == expected.dtype and torch.equal(cached, expected)


def test_float16_equals_live_encoding_nearly(encoder, tmp_path):
    text = EmbeddedText(embed_captions(encoder, CAPTIONS, tmp_path, batch=2))
    shuffled = CAPTIONS[::-1] * 3
    cached, expected = text(text.tokenise(shuffled)), live(encoder, shuffled)
    assert cached.tokens.dtype == cached.pooled.dtype == torch.float32
    assert torch.equal(cached.mask, expected.mask)
    for name in ("tokens", "pooled"):
        torch.testing.assert_close(getattr(cached, name), getattr(expected, name), rtol=1e-3, atol=1e-3)
        assert not torch.equal(getattr(cached, name), getattr(expected, name))


def test_it_stands_in_for_its_encoder(encoder, tmp_path):
    text = EmbeddedText(embed_captions(encoder, CAPTIONS, tmp_path))
    assert (text.length, text.width, text.frozen) == (encoder.length, encoder.width, True)
    assert text.to_dict() == encoder.to_dict() and text.fingerprint() == encoder.fingerprint()
    assert type(build_text_encoder(text.to_dict())) is type(encoder)
    assert list(text.parameters()) == [] and text.state_dict() == {}
    assert initialise(text, 0) is text
    again = torch.load(*save(text, tmp_path / "whole"), weights_only=False)
    assert torch.equal(again(text.tokenise(["a circle"])).tokens, text(text.tokenise(["a circle"])).tokens)


def save(value, path):
    torch.save(value, path)
    return (path,)


def test_pickles_do_not_hold_the_embeddings(tmp_path):
    many = [f"number {i}" for i in range(400)]
    text = EmbeddedText(embed_captions(words(), many, tmp_path, dtype="float32"))
    save(text, tmp_path / "whole")
    assert (tmp_path / "whole").stat().st_size < (text.folder / "tokens.npy").stat().st_size / 2


def test_it_works_in_a_compiled_model(tmp_path):
    text = EmbeddedText(embed_captions(words(), CAPTIONS, tmp_path))
    compiled = torch.compile(lambda numbers: text(numbers).tokens * 2, backend="eager")
    numbers = text.tokenise(CAPTIONS)
    assert torch.equal(compiled(numbers), text(numbers).tokens * 2)


def test_unknown_captions_are_refused(tmp_path):
    text = EmbeddedText(embed_captions(words(), CAPTIONS, tmp_path))
    with pytest.raises(SettingError, match="caption 'a cow' is not among the 5 text embeddings"):
        text.tokenise(["a circle", "a cow"])


def test_odd_captions_are_kept_apart(tmp_path):
    odd = ["A circle", "a circle", "a circle ", "a\ncircle", "ein Kreis ○", "\ud800"]
    text = EmbeddedText(embed_captions(words(), odd, tmp_path))
    assert len({row for (row,) in text.tokenise([*odd, ""]).tolist()}) == 7


def test_what_is_on_disk(tmp_path):
    place = embed_captions(words(), CAPTIONS, tmp_path)
    assert place.parent == tmp_path
    tokens = np.load(place / "tokens.npy")
    assert tokens.shape == (5, 6, 8) and tokens.dtype == np.float16
    assert np.load(place / "pooled.npy").shape == (5, 8) and np.load(place / "mask.npy").dtype == bool
    assert json.loads((place / "captions.json").read_text()) == UNIQUE
    about = json.loads((place / "about.json").read_text())
    assert (about["dtype"], about["rows"], about["encoder"]["name"]) == ("float16", 5, "words")
    assert {path.name for path in place.iterdir()} == {*FILES, "about.json", "lock"}


def test_the_same_call_encodes_once(tmp_path):
    first = slow()
    place = embed_captions(first, CAPTIONS, tmp_path)
    before = contents(place)
    second = slow()
    assert embed_captions(second, CAPTIONS[::-1] * 2, tmp_path) == place
    assert first.calls > 0 and second.calls == 0 and contents(place) == before


def test_other_captions_weights_and_dtypes_live_side_by_side(tmp_path):
    places = {
        embed_captions(words(), CAPTIONS, tmp_path),
        embed_captions(words(), CAPTIONS[:2], tmp_path),
        embed_captions(words(seed=1), CAPTIONS, tmp_path),
        embed_captions(words(), CAPTIONS, tmp_path, dtype="float32"),
        embed_captions(words(length=5), CAPTIONS, tmp_path),
    }
    assert len(places) == 5 and all(EmbeddedText(place).tokenise([""]).tolist() == [[0]] for place in places)


def test_the_encoders_mode_is_kept_and_its_gradients_are_not_wanted(tmp_path):
    encoder, modes = words().train(), set()
    encoder.register_forward_hook(lambda module, *_: modes.add((module.training, torch.is_grad_enabled())))
    embed_captions(encoder, CAPTIONS, tmp_path)
    assert modes == {(False, False)}
    assert encoder.training and all(p.grad is None and p.requires_grad for p in encoder.parameters())


def test_progress_is_reported(tmp_path):
    seen = []
    embed_captions(words(), CAPTIONS, tmp_path, batch=2, report=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_an_interrupted_call_is_no_cache_and_is_continued(tmp_path, monkeypatch, fails_at):
    """Calls: one for the shape, then rows 0-1, 2-3 and 4."""
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    whole = contents(embed_captions(slow(), CAPTIONS, tmp_path / "whole", batch=2))
    with pytest.raises(KeyboardInterrupt):
        embed_captions(slow(fails_at), CAPTIONS, tmp_path / "part", batch=2)
    (place,) = (tmp_path / "part").iterdir()
    with pytest.raises(SettingError, match="about.json is missing"):
        EmbeddedText(place)
    rest = slow()
    assert embed_captions(rest, CAPTIONS, tmp_path / "part", batch=2) == place
    assert rest.calls == 4 - max(0, fails_at - 2) and contents(place) == whole


def test_rows_that_may_not_have_reached_the_disk_are_written_anew(tmp_path, monkeypatch):
    """As a power cut leaves it: progress of two rows, garbage or nothing behind them."""
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    whole = contents(embed_captions(slow(), CAPTIONS, tmp_path / "whole", batch=2))
    for number, spoil in enumerate((lambda data: data + b"garbage", lambda data: data[:-1], lambda data: b"")):
        folder = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            embed_captions(slow(3), CAPTIONS, folder, batch=2)
        (place,) = folder.iterdir()
        (place / "tokens.npy").write_bytes(spoil((place / "tokens.npy").read_bytes()))
        embed_captions(slow(), CAPTIONS, folder, batch=2)
        assert contents(place) == whole


SCRIPT = """
import sys, time
sys.path[:0] = {tests!r}
import test_text_cache as t

class Halting(t.Slow):
    def forward(self, numbers):
        if self.calls == 3:
            print("halted", flush=True)
            time.sleep(60)
        return super().forward(numbers)

t.module.SAVE_SECONDS = 0.0
encoder = t.initialise(Halting(t.Vocabulary.from_captions(t.CAPTIONS, 6), 8, 1, 2), 0)
t.embed_captions(encoder, t.CAPTIONS, {folder!r}, batch=2)
"""


def test_a_killed_process_is_continued(tmp_path):
    script = SCRIPT.format(tests=[str(folder) for folder in Path(__file__).parents[:2]], folder=str(tmp_path / "part"))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    assert process.stdout.readline() == b"halted\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (place,) = (tmp_path / "part").iterdir()
    assert json.loads((place / "progress.json").read_text()) == {"rows": 4}
    rest, started = slow(), time.monotonic()
    embed_captions(rest, CAPTIONS, tmp_path / "part", batch=2)
    assert time.monotonic() - started < 5  # the dead process holds no lock
    assert rest.calls == 2
    assert contents(place) == contents(embed_captions(slow(), CAPTIONS, tmp_path / "whole", batch=2))


def test_two_that_want_the_same_cache_make_it_once(tmp_path):
    encoders = [slow(), slow()]
    with ThreadPoolExecutor() as pool:
        places = list(pool.map(lambda encoder: embed_captions(encoder, CAPTIONS, tmp_path, batch=1), encoders))
    assert places[0] == places[1]
    assert sorted(encoder.calls for encoder in encoders) == [0, 6]


def test_memory_does_not_grow_with_the_cache(tmp_path):
    many = [str(i) for i in range(400)]
    tracemalloc.start()
    try:
        place = embed_captions(Scaled(1.0, 256, 64), many, tmp_path, batch=8)
        text = EmbeddedText(place)
        text(text.tokenise(many[:8]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    batch = 8 * 256 * 64 * 2
    assert (place / "tokens.npy").stat().st_size > 50 * batch and batch < peak < 8 * batch


@pytest.mark.parametrize("name", FILES)
def test_missing_and_cut_files_are_noticed_at_once(tmp_path, name):
    place = embed_captions(words(), CAPTIONS, tmp_path)
    data = (place / name).read_bytes()
    other = "bytes long instead of"
    for spoiled, message in ((data[:-1], other), (data + b" ", other), (None, "missing")):
        (place / name).unlink()
        if spoiled is not None:
            (place / name).write_bytes(spoiled)
        with pytest.raises(SettingError, match=f"text embeddings.*{name} is .*{message}"):
            EmbeddedText(place)
        with pytest.raises(SettingError, match="delete the folder"):
            embed_captions(words(), CAPTIONS, tmp_path)
        (place / name).write_bytes(data)
    EmbeddedText(place, verify=True)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_changed_header_is_noticed_at_once(tmp_path):
    place = embed_captions(words(), CAPTIONS, tmp_path)
    data = (place / "tokens.npy").read_bytes()
    for old, new in ((b"(5, 6, 8)", b"(5, 8, 6)"), (b"<f2", b"<i2"), (b"NUMPY", b"NUMPI")):
        (place / "tokens.npy").write_bytes(data.replace(old, new))
        with pytest.raises(SettingError, match="tokens.npy is"):
            EmbeddedText(place)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_when_asked_for_and_when_a_cache_is_found(tmp_path, name):
    place = embed_captions(words(), CAPTIONS, tmp_path)
    flip(place / name, -3)
    if name != "captions.json":
        EmbeddedText(place)
    for read in (lambda: EmbeddedText(place, verify=True), lambda: embed_captions(words(), CAPTIONS, tmp_path)):
        with pytest.raises(SettingError, match=f"{name} is changed since it was written"):
            read()


def test_changed_captions_are_always_noticed(tmp_path):
    """They decide which row a caption means, and are small enough to be read through each time."""
    place = embed_captions(words(), CAPTIONS, tmp_path)
    path = place / "captions.json"
    path.write_text(path.read_text().replace("two stars", "two stabs"))
    with pytest.raises(SettingError, match="captions.json is changed"):
        EmbeddedText(place)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"format": 0}', "[]"])
def test_an_unreadable_description_is_refused(tmp_path, text):
    place = embed_captions(words(), CAPTIONS, tmp_path)
    (place / "about.json").write_text(text)
    with pytest.raises(SettingError, match="text embeddings.*about.json is not"):
        EmbeddedText(place)


def test_no_cache_at_all(tmp_path):
    with pytest.raises(SettingError, match="about.json is missing"):
        EmbeddedText(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is unknown; allowed: float16, float32"),
        ({"batch": 0}, "batch=0 must be at least 1"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(SettingError, match=message):
        embed_captions(words(), CAPTIONS, tmp_path, **options)


def test_values_beyond_float16_are_refused(tmp_path):
    with pytest.raises(SettingError, match="tokens are not finite in dtype=float16; use dtype=float32"):
        embed_captions(Scaled(7e4), CAPTIONS, tmp_path)
    text = EmbeddedText(embed_captions(Scaled(7e4), CAPTIONS, tmp_path, dtype="float32"))
    assert text(text.tokenise([""])).tokens.item() == 7e4
    with pytest.raises(SettingError, match="tokens are not finite in dtype=float32$"):
        embed_captions(Scaled(float("nan")), CAPTIONS, tmp_path, dtype="float32")


def test_a_dtype_below_the_files_loses_nothing(tmp_path):
    encoder = CLIPText(str(save_clip(tmp_path / "clip")), "float16")
    text = EmbeddedText(embed_captions(encoder, CAPTIONS, tmp_path))
    assert torch.equal(text(text.tokenise(UNIQUE)).tokens, live(encoder, UNIQUE).tokens.float())
