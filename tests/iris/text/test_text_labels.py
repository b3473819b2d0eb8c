"""Class labels as text."""

import pytest
import torch

from iris.errors import SettingError
from iris.randomness import initialise
from iris.text import ClassLabels, build_text_encoder

NAMES = ["cat", "dog", "a red fox"]
WIDTH = 6


def labels(seed=0):
    return initialise(ClassLabels(NAMES, WIDTH), seed)


def test_each_class_has_its_number():
    numbers = labels().tokenise(["dog", "", "cat", "a red fox"])
    assert numbers.dtype == torch.int64 and numbers.tolist() == [[2], [0], [1], [3]]
    assert labels().tokenise([]).shape == (0, 1)


def test_each_class_has_one_learned_token():
    encoder = labels()
    text = encoder(encoder.tokenise([*NAMES, ""]))
    assert text.tokens.shape == (4, 1, WIDTH) and text.mask.tolist() == [[True]] * 4
    assert torch.equal(text.tokens[:, 0], encoder.table.weight[[1, 2, 3, 0]])
    assert torch.equal(text.pooled, text.tokens[:, 0])
    assert len({tuple(row) for row in text.pooled.tolist()}) == 4
    assert (encoder.length, encoder.width, encoder.frozen) == (1, WIDTH, False)


def test_only_the_classes_of_the_batch_are_trained():
    encoder = labels()
    text = encoder(encoder.tokenise(["dog", ""]))
    (text.tokens.sum() + text.pooled.square().sum()).backward()
    assert (encoder.table.weight.grad.abs().sum(1) > 0).tolist() == [True, False, True, False]


def test_captions_become_sorted_classes():
    encoder = ClassLabels.from_captions(["dog", "cat", "", "dog"], WIDTH)
    assert encoder.classes == ["cat", "dog"] and encoder.table.weight.shape == (3, WIDTH)
    with pytest.raises(SettingError, match="model.text=labels: 3 different captions are more than 2"):
        ClassLabels.from_captions(["a", "b", "c"], WIDTH, most=2)
    assert len(ClassLabels.from_captions([f"{i}" for i in range(10_000)], 1).classes) == 10_000
    with pytest.raises(SettingError, match="words or clip"):
        ClassLabels.from_captions([f"{i}" for i in range(10_001)], 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one"),
        (["a", ""], "not empty"),
        (["a", " "], "not empty"),
        (["a", 3], "must be text"),
        (["a", "b", "a"], "'a' is given twice"),
    ],
)
def test_names_are_unique_and_not_empty(names, message):
    with pytest.raises(SettingError, match=f"model.text=labels.*{message}"):
        ClassLabels(names, WIDTH)


def test_width_is_checked():
    with pytest.raises(SettingError, match="model.text_width=0"):
        ClassLabels(NAMES, 0)


def test_an_unknown_caption_is_refused_with_some_that_are_known():
    with pytest.raises(SettingError, match="caption 'cow' is not one of the 3 classes.*allowed: cat, dog, a red fox$"):
        labels().tokenise(["cat", "cow"])
    many = ClassLabels([f"class {i}" for i in range(1000)], 1)
    with pytest.raises(SettingError, match="class 9, …$") as error:
        many.tokenise(["cow"])
    assert len(str(error.value)) < 300


def test_it_comes_back_from_its_dict():
    encoder = labels()
    again = build_text_encoder(encoder.to_dict())
    assert encoder.to_dict() == {"name": "labels", "classes": NAMES, "width": WIDTH}
    again.load_state_dict(encoder.state_dict())
    assert again.fingerprint() == encoder.fingerprint() != labels(seed=1).fingerprint()
    assert torch.equal(again(again.tokenise(NAMES)).tokens, encoder(encoder.tokenise(NAMES)).tokens)
