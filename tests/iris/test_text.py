"""The vocabulary and the word encoder."""

import pytest
import torch
from small_models import CAPTIONS

from iris.errors import SettingError
from iris.randomness import initialise
from iris.text import PAD, START, UNKNOWN, Vocabulary, WordEncoder

WIDTH = 16


def encoder(length=8, layers=2, seed=0):
    return initialise(WordEncoder(Vocabulary.from_captions(CAPTIONS, length), WIDTH, layers), seed)


def test_words_are_ranked_by_frequency_then_alphabet():
    vocabulary = Vocabulary.from_captions(["b a c", "a b", "a d!", "A"], 4)
    assert vocabulary.words == ["a", "b", "c", "d"]
    assert len(vocabulary) == 4 + 3
    assert Vocabulary.from_captions(["b a c", "a b"], 4, most=1).words == ["a"]


def test_order_of_captions_does_not_matter():
    assert Vocabulary.from_captions(CAPTIONS, 4).words == Vocabulary.from_captions(CAPTIONS[::-1], 4).words


def test_encoding_pads_cuts_and_marks_the_unknown():
    vocabulary = Vocabulary(["red", "circle"], 4)
    red, circle = 3, 4
    assert vocabulary.encode(["Red, circle.", "", "red moon", "red red red red circle"]).tolist() == [
        [START, red, circle, PAD],
        [START, PAD, PAD, PAD],
        [START, red, UNKNOWN, PAD],
        [START, red, red, red],
    ]


def test_numbers_stay_inside_the_table():
    vocabulary = Vocabulary.from_captions(CAPTIONS, 12)
    numbers = vocabulary.encode([*CAPTIONS, "something else"])
    assert numbers.dtype == torch.int64 and numbers.max() < len(vocabulary)
    assert Vocabulary(vocabulary.words, 40).encode([" ".join(vocabulary.words)]).max() == len(vocabulary) - 1
    assert UNKNOWN not in vocabulary.encode(CAPTIONS)


def test_captions_without_words_are_refused():
    for captions in ([], ["", "!?"]):
        with pytest.raises(SettingError, match="data.text_column"):
            Vocabulary.from_captions(captions, 4)


def test_shapes_and_mask():
    model = encoder()
    text = model(model.vocabulary.encode(CAPTIONS))
    assert text.tokens.shape == (4, 8, WIDTH) and text.mask.shape == (4, 8) and text.pooled.shape == (4, WIDTH)
    assert text.mask.sum(1).tolist() == [4, 6, 3, 3]


def test_padding_changes_nothing():
    model = encoder()
    numbers = model.vocabulary.encode(CAPTIONS)
    before = model(numbers)
    with torch.no_grad():
        model.word.weight[PAD] += 10
    after = model(numbers)
    torch.testing.assert_close(after.pooled, before.pooled)
    torch.testing.assert_close(after.tokens[before.mask], before.tokens[before.mask])
    assert (after.tokens - before.tokens)[~before.mask].abs().max() > 1


def test_pooled_is_the_mean_of_tokens_that_count():
    model = encoder()
    text = model(model.vocabulary.encode(CAPTIONS))
    for i in range(len(CAPTIONS)):
        torch.testing.assert_close(text.pooled[i], text.tokens[i][text.mask[i]].mean(0), rtol=1e-5, atol=1e-6)


def test_batch_elements_are_independent():
    model = encoder()
    together = model(model.vocabulary.encode(CAPTIONS))
    alone = model(model.vocabulary.encode(CAPTIONS[1:2]))
    torch.testing.assert_close(alone.pooled, together.pooled[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("one", "other"), [("a red circle", "a red square"), ("red blue", "blue red"), ("", "a")])
def test_words_and_their_order_matter(one, other):
    model = encoder()
    pooled = model(model.vocabulary.encode([one, other])).pooled
    assert (pooled[0] - pooled[1]).abs().max() > 1e-2


def test_the_empty_caption_is_finite():
    model = encoder()
    text = model(model.vocabulary.encode([""]))
    text.pooled.sum().backward()
    assert text.tokens.isfinite().all() and text.pooled.isfinite().all()
    assert model.word.weight.grad.isfinite().all()


def test_every_parameter_gets_a_finite_gradient():
    model = encoder()
    text = model(model.vocabulary.encode(CAPTIONS))
    (text.tokens.square() * text.mask[..., None]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    assert (model.word.weight.grad[PAD] == 0).all()
