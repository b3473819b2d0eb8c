"""What every text encoder must do. A new line in ``TEXT_ENCODERS`` is tested here."""

import copy
import json

import pytest
import torch
from conformance import (
    CAPTIONS,
    check_gradients,
    compiled,
    drawn,
    expected_failures,
    exported,
    loss,
    parameter_count,
    relative_error,
    text_cases,
)

from iris.text import build_text_encoder


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", expected_failures(metafunc.function.__name__, text_cases()))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Where encoders that need files find them, written once."""
    return tmp_path_factory.mktemp("text")


@pytest.fixture
def encoder(case, files):
    return case.make(files)


def encode(encoder, captions):
    return encoder(encoder.tokenise(captions))


def weights(encoder):
    return {name: value.detach().clone() for name, value in encoder.named_parameters()}


def assert_equal(one, two):
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("count", [1, 4])
def test_shapes(encoder, count):
    numbers = encoder.tokenise(CAPTIONS[:count])
    assert numbers.shape[0] == count and numbers.dim() == 2 and numbers.dtype == torch.int64
    text = encoder(numbers)
    assert text.tokens.shape == (count, encoder.length, encoder.width)
    assert text.mask.shape == (count, encoder.length) and text.mask.dtype == torch.bool and text.mask.any(1).all()
    assert text.pooled.shape == (count, encoder.width)
    assert text.tokens.dtype == text.pooled.dtype and text.tokens.isfinite().all() and text.pooled.isfinite().all()


def test_empty_caption_is_the_null_prompt(encoder):
    """Of the length of all others, so that dropout can replace a row of numbers; different from all of them."""
    null = encoder.tokenise([""])
    assert null.shape == encoder.tokenise(CAPTIONS[:1]).shape
    empty, text = encoder(null), encode(encoder, CAPTIONS)
    assert empty.mask.any() and empty.tokens.isfinite().all() and empty.pooled.isfinite().all()
    for pooled in text.pooled:
        assert relative_error(pooled, empty.pooled[0]) > 1e-2


def test_captions_differ(encoder):
    pooled = encode(encoder, CAPTIONS).pooled
    for i in range(len(CAPTIONS)):
        for j in range(i):
            assert relative_error(pooled[i], pooled[j]) > 1e-2, f"{CAPTIONS[i]!r} is encoded as {CAPTIONS[j]!r}"


def test_encoding_does_not_depend_on_the_neighbours(encoder):
    together = encode(encoder, [*CAPTIONS, ""])
    for i, caption in enumerate([*CAPTIONS, ""]):
        assert torch.equal(encoder.tokenise([caption])[0], encoder.tokenise([*CAPTIONS, ""])[i])
        alone = encode(encoder, [caption])
        assert torch.equal(alone.mask[0], together.mask[i])
        tolerance = 1e-5 if together.tokens.dtype == torch.float32 else 2e-2
        for one, two in ((alone.tokens[0], together.tokens[i]), (alone.pooled[0], together.pooled[i])):
            assert relative_error(one, two) < tolerance


def test_same_seed_same_output_other_seed_other_output(case, encoder, files):
    assert_equal(encode(encoder, CAPTIONS), encode(encoder, CAPTIONS))
    assert_equal(encode(encoder, CAPTIONS), encode(case.make(files), CAPTIONS))
    other = encode(case.make(files, seed=1), CAPTIONS)
    assert torch.equal(other.pooled, encode(encoder, CAPTIONS).pooled) == encoder.frozen


def test_training_and_evaluation_agree(encoder):
    with torch.inference_mode():
        evaluated = [part.clone() for part in encode(encoder.eval(), CAPTIONS)]
    for one, two in zip(encode(encoder.train(), CAPTIONS), evaluated, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_every_parameter_gets_a_finite_gradient(encoder):
    if encoder.frozen:
        pytest.skip("frozen")
    assert parameter_count(encoder)
    text = encode(encoder, [*CAPTIONS, "", CAPTIONS[0]])
    loss(text.tokens * text.mask.unsqueeze(-1), text.pooled).backward()
    check_gradients(encoder)


def test_frozen_weights_are_neither_trained_nor_drawn(encoder):
    before = weights(encoder)
    drawn(encoder, seed=5)
    changed = any(not torch.equal(before[name], value) for name, value in weights(encoder).items())
    assert changed != encoder.frozen
    assert all(p.requires_grad != encoder.frozen for p in encoder.parameters())
    if encoder.frozen:
        text = encode(encoder, CAPTIONS)
        assert not text.tokens.requires_grad and not text.pooled.requires_grad


def test_dictionary_and_state_dict_round_trip(encoder):
    """What a checkpoint holds: ``to_dict`` as JSON and the state dict."""
    values = json.loads(json.dumps(encoder.to_dict()))
    assert values == encoder.to_dict()
    other = drawn(build_text_encoder(values), seed=1)
    expected = encode(encoder, CAPTIONS)
    if not encoder.frozen:
        assert not torch.equal(encode(other, CAPTIONS).pooled, expected.pooled)
    other.load_state_dict(copy.deepcopy(encoder.state_dict()))
    for one, two in zip(encode(other, CAPTIONS), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert other.fingerprint() == encoder.fingerprint()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)], ids=["bf16", "fp16"])
def test_autocast_is_close_to_float32(encoder, dtype, tolerance):
    expected = encode(encoder, CAPTIONS)
    if expected.tokens.dtype != torch.float32:
        pytest.skip("its weights are in half precision as they are")
    with torch.autocast("cpu", dtype):
        text = encode(encoder, CAPTIONS)
    assert torch.equal(text.mask, expected.mask)
    for one, two in ((text.tokens, expected.tokens), (text.pooled, expected.pooled)):
        assert one.isfinite().all() and relative_error(one, two) < tolerance


def test_compiles(case, encoder):
    """torch.compile in one graph, forward and backward as without it."""
    results, numbers = [], encoder.tokenise(CAPTIONS)
    for run in (compiled(encoder, case), encoder):
        encoder.zero_grad()
        text = run(numbers)
        if not encoder.frozen:
            loss(text.tokens, text.pooled).backward()
        results.append([*text, *(p.grad for p in encoder.parameters() if p.requires_grad)])
    tolerance = 1e-5 if results[1][0].dtype == torch.float32 else 2e-2
    for traced, eager in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=tolerance, atol=tolerance)


def test_exports(encoder):
    """torch.export with a free batch size, output as without it."""
    with torch.no_grad():
        program = exported(encoder.eval(), encoder.tokenise(CAPTIONS[:2]))
        for count in (1, 2, 4):
            text, expected = program(encoder.tokenise(CAPTIONS[:count])), encode(encoder, CAPTIONS[:count])
            tolerance = 1e-5 if expected.tokens.dtype == torch.float32 else 2e-2
            for traced, eager in zip(text, expected, strict=True):
                torch.testing.assert_close(traced, eager, rtol=tolerance, atol=tolerance)
