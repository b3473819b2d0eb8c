"""The vocabulary, the word encoder, and what all text encoders share."""

import pytest
import torch
from small_clip import save_clip
from small_models import CAPTIONS

from iris.errors import SettingError
from iris.randomness import initialise
from iris.text import (
    PAD,
    START,
    TEXT_ENCODERS,
    UNKNOWN,
    ClassLabels,
    CLIPText,
    EmbeddedText,
    Vocabulary,
    WordEncoder,
    build_text_encoder,
    embed_captions,
)

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


def test_names_of_the_word_encoders_parameters_stay():
    """Saved models and finished trials depend on them."""
    parts = ("qkv", "out", "feed_forward.up", "feed_forward.down")
    layer = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    expected = ["word.weight", "position.weight", *(f"layers.{i}.{name}" for i in range(2) for name in layer)]
    assert list(encoder().state_dict()) == expected


@pytest.mark.parametrize("named", [True, False])
def test_the_word_encoder_comes_back_from_its_dict(named):
    """A dict without a name is what models saved before there were several encoders have."""
    model = initialise(WordEncoder(Vocabulary.from_captions(CAPTIONS, 8), WIDTH, layers=3, heads=2), 0)
    values = model.to_dict()
    shape = {"length": 8, "width": WIDTH, "layers": 3, "heads": 2}
    assert values == {"name": "words", "words": model.vocabulary.words} | shape
    again = build_text_encoder(values if named else {key: values[key] for key in values if key != "name"})
    assert type(again) is WordEncoder and again.to_dict() == values
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(again.tokenise(CAPTIONS)).tokens, model(model.vocabulary.encode(CAPTIONS)).tokens)


def test_unknown_encoders_and_values_are_refused():
    with pytest.raises(SettingError, match="model.text='x' is unknown; allowed: words, clip, labels$"):
        build_text_encoder({"name": "x"})
    for values in ({"name": "words"}, {"name": "labels", "classes": ["a"]}, {"name": "clip", "size": 3}):
        with pytest.raises(SettingError, match=f"model.text={values['name']}"):
            build_text_encoder(values)


@pytest.fixture(params=[*TEXT_ENCODERS, "embedded"])
def any_encoder(request, tmp_path):
    """One encoder of each kind, that knows ``CAPTIONS``."""
    if request.param == "labels":
        return initialise(ClassLabels.from_captions(CAPTIONS, WIDTH), 0)
    if request.param == "clip":
        return CLIPText(str(save_clip(tmp_path)))
    if request.param == "embedded":
        return EmbeddedText(embed_captions(encoder(), CAPTIONS, tmp_path))
    return encoder()


def test_dropped_captions_are_the_null_prompt(any_encoder):
    """As FlowTask drops them: rows of numbers are replaced by the row of ""."""
    numbers, null = any_encoder.tokenise(CAPTIONS), any_encoder.tokenise([""])[0]
    dropped = torch.tensor([True, False, False, True])
    mixed = torch.where(dropped[:, None], null, numbers)
    assert mixed.dtype == torch.int64 and mixed.shape == numbers.shape
    text = any_encoder(mixed)
    expected = any_encoder(any_encoder.tokenise(["", *CAPTIONS[1:3], ""]))
    assert all(torch.equal(one, other) for one, other in zip(text, expected, strict=True))
    kept = any_encoder(numbers)
    assert torch.equal(text.pooled[1:3], kept.pooled[1:3])
    assert (text.pooled[[0, 3]] - kept.pooled[[0, 3]]).abs().amax(1).min() > 1e-3


def test_all_give_what_they_announce(any_encoder):
    text = any_encoder(any_encoder.tokenise(CAPTIONS))
    assert text.tokens.shape == (4, any_encoder.length, any_encoder.width)
    assert text.mask.shape == (4, any_encoder.length) and text.mask.dtype == torch.bool and text.mask.any(1).all()
    assert text.pooled.shape == (4, any_encoder.width)
    assert any_encoder.to_dict()["name"] in TEXT_ENCODERS
    assert any_encoder.frozen == (not any(p.requires_grad for p in any_encoder.parameters()))


def test_initialisation_leaves_the_frozen_alone(tmp_path):
    frozen = CLIPText(str(save_clip(tmp_path)))
    before = {name: weight.clone() for name, weight in frozen.named_parameters()}
    beside = torch.nn.Linear(3, 3)
    model = initialise(torch.nn.ModuleDict({"text": torch.nn.Sequential(frozen), "beside": beside}), 0)
    assert all(torch.equal(weight, before[name]) for name, weight in frozen.named_parameters())
    alone = initialise(torch.nn.ModuleDict({"beside": torch.nn.Linear(3, 3)}), 0)
    assert torch.equal(model["beside"].weight, alone["beside"].weight)
    assert initialise(frozen, 0) is frozen


def test_initialisation_draws_what_is_not_frozen():
    """frozen=False, and attributes of that name that are no switch, change nothing."""

    class Part(torch.nn.Sequential):
        frozen = False

    class Other(torch.nn.Sequential):
        def frozen(self):
            return True

    weights = [initialise(kind(torch.nn.Linear(3, 3)), 0)[0].weight for kind in (Part, Other, torch.nn.Sequential)]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
