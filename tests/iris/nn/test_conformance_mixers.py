"""What every mixer must do.

A new line in ``MIXERS`` is tested here; ``pytest tests/iris --mixer my_module:MyMixer`` tests one from outside.
"""

import copy
import os
import shutil

import pytest
import torch
from conformance import (
    DIM,
    SAME_FUNCTION,
    MixerCase,
    check_gradients,
    compiled,
    expected_failures,
    exported,
    is_variant,
    loss,
    may_see,
    mixer_cases,
    mixer_option_values,
    mixer_options,
    parameter_count,
    relative_error,
)

from iris.errors import SettingError
from iris.nn.mixers import OPTION_GROUPS, MixerOptions, is_resizable

GRIDS = [(4, 4), (5, 7), (7, 5), (3, 8), (1, 6), (6, 1), (1, 1)]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = mixer_cases(metafunc.config.getoption("mixer", default=[]))
        metafunc.parametrize("case", expected_failures(metafunc.function.__name__, cases))


def tokens(batch, h, w, seed=0):
    return torch.randn(batch, h, w, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_shape_is_kept(case, grid):
    mixer = case.make()
    for batch in (1, 3):
        x = tokens(batch, *grid)
        y = mixer(x)
        assert y.shape == x.shape and y.dtype == x.dtype
        assert y.isfinite().all() and y.std() > 0


def test_runs_on_a_grid_unseen_in_training(case):
    mixer = case.make()
    if parameter_count(mixer):
        before = copy.deepcopy(mixer.state_dict())
        optimiser = torch.optim.AdamW(mixer.parameters(), lr=1e-2)
        for step in range(2):
            optimiser.zero_grad()
            (mixer(tokens(2, 4, 4, seed=step)) - tokens(2, 4, 4, seed=9)).square().mean().backward()
            optimiser.step()
        assert any(not torch.equal(before[name], value) for name, value in mixer.state_dict().items())
    y = mixer(tokens(2, 6, 5))
    assert y.shape == (2, 6, 5, DIM) and y.isfinite().all() and y.std() > 0


@pytest.mark.parametrize("grid", [(4, 4), (5, 7)], ids=["4x4", "5x7"])
def test_every_parameter_gets_a_finite_gradient(case, grid):
    mixer = case.make()
    x = tokens(2, *grid).requires_grad_()
    loss(mixer(x)).backward()
    check_gradients(mixer, input=x)


def test_gradient_at_zero_input_is_finite(case):
    mixer = case.make()
    x = torch.zeros(1, 4, 4, DIM, requires_grad=True)
    loss(mixer(x)).backward()
    for name, parameter in [*mixer.named_parameters(), ("input", x)]:
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=["bf16", "fp16"])
def test_autocast_is_close_to_float32(case, dtype, tolerance):
    mixer = case.make()
    for grid in [(4, 4), (5, 7)]:
        x = tokens(2, *grid).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = mixer(x)
            loss(y).backward()
        assert y.isfinite().all()
        assert relative_error(y, mixer(x)) < tolerance
        for name, parameter in [*mixer.named_parameters(), ("input", x)]:
            assert parameter.grad.isfinite().all(), name


def test_runs_in_bfloat16(case):
    mixer, x = case.make(), tokens(2, 5, 7)
    expected = mixer(x)
    y = mixer.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert relative_error(y, expected) < 5e-2


def test_same_seed_same_output_other_seed_other_output(case):
    x, mixer = tokens(2, 5, 7), case.make()
    assert torch.equal(mixer(x), mixer(x))
    assert torch.equal(mixer(x), case.make()(x))
    if parameter_count(mixer):
        assert relative_error(case.make(seed=1)(x), mixer(x)) > 1e-2


def test_training_and_evaluation_agree(case):
    x, mixer = tokens(1, 2, 9), case.make()  # a grid of this test alone: what is cached is cached under inference mode
    with torch.inference_mode():
        evaluated = mixer.eval()(x).clone()
    trained = mixer.train()(x.requires_grad_())
    torch.testing.assert_close(trained, evaluated, rtol=1e-6, atol=1e-6)
    loss(trained).backward()
    assert x.grad.isfinite().all()


def test_state_dict_round_trip(case):
    x, mixer, other = tokens(1, 4, 6), case.make(), case.make(seed=1)
    other.load_state_dict(copy.deepcopy(mixer.state_dict()))
    assert torch.equal(other(x), mixer(x))


def test_batch_elements_are_independent(case):
    mixer, x = case.make(), tokens(3, 5, 7)
    together = mixer(x)
    for i in range(3):
        torch.testing.assert_close(mixer(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)
    changed = x.clone()
    changed[1] = tokens(1, 5, 7, seed=9)[0]
    after = mixer(changed)
    torch.testing.assert_close(after[[0, 2]], together[[0, 2]], rtol=1e-5, atol=1e-6)
    assert relative_error(after[1], together[1]) > 1e-2


def test_sees_as_far_as_it_claims(case):
    mixer = case.make()
    reach = getattr(mixer, "reach", None)
    h, w = (3, 4) if reach is None else (reach + 2, 2 * reach + 3)
    # Sums over draws: a ReLU may cut one path at one draw, but not at all of them.
    gradient = sum(dependence(mixer, tokens(1, h, w, seed)) for seed in range(4))
    allowed = may_see(case, reach, h, w)
    assert (gradient[~allowed] == 0).all(), f"sees further than reach={reach}"
    if reach is None:
        assert (gradient[allowed] > 1e-7).all(), "some output misses some token that it claims to see"
    else:
        border = allowed & ~may_see(case, reach - 1, h, w)
        assert (gradient[border] > 1e-7).any(), f"sees nothing at distance reach={reach}"


def dependence(mixer, x):
    """How much each output token (rows) changes with each input token (columns), exactly zero where it does not."""
    x.requires_grad_()
    y = (mixer(x) * torch.randn(DIM, generator=torch.Generator().manual_seed(3))).sum(-1).flatten()
    return torch.stack([torch.autograd.grad(one, x, retain_graph=True)[0].abs().sum(-1).flatten() for one in y])


def test_width_changes_the_number_of_parameters(case):
    count = {width: parameter_count(case.make(width=width)) for width in (None, DIM, 2 * DIM)}
    assert count[None] == count[DIM]
    assert (count[2 * DIM] > count[DIM]) if is_resizable(case.name) else (count[2 * DIM] == count[DIM])
    assert case.make(width=2 * DIM)(tokens(2, 5, 7)).shape == (2, 5, 7, DIM)


def test_width_that_heads_do_not_divide_is_refused(case):
    try:
        mixer = case.make(width=18, heads=4)
    except SettingError as error:
        assert "model.mixer_width=18" in str(error)
    else:  # right only for a mixer that has no heads
        x = tokens(2, 4, 4)
        assert torch.equal(mixer(x), case.make(width=18, heads=1)(x)), "width=18 was taken with heads=4"


def test_options_change_the_mixer(case):
    if not case.options:
        pytest.skip("no options set")
    x, default, mixer = tokens(2, 6, 5), MixerCase(case.name).make(), case.make()
    if {option for option, _ in case.options} <= SAME_FUNCTION:
        mixer.load_state_dict(default.state_dict())
        torch.testing.assert_close(mixer(x), default(x), rtol=1e-5, atol=1e-5)
    else:
        # spatial.decay=fixed stays where learned starts: what it changes is what can be trained.
        assert relative_error(mixer(x), default(x)) > 1e-3 or parameter_count(mixer) != parameter_count(default)


def traced_grid(case):
    """A grid that no other test uses: what is traced first must not be what later passes find in a cache.

    Large enough for a scan of more than one chunk, except for variants.
    """
    return (2, 3) if is_variant(case) else (3, 6)


def test_compiles(case):
    """torch.compile in one graph, forward and backward as without it."""
    mixer, x = case.make(), tokens(2, *traced_grid(case))
    results = []
    for run in (compiled(mixer, case), mixer):
        mixer.zero_grad()
        inputs = x.clone().requires_grad_()
        y = run(inputs)
        loss(y).backward()
        results.append([y, inputs.grad, *(p.grad for p in mixer.parameters())])
    for traced, eager in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler (CXX or g++)")
def test_grfm_compiles_to_machine_code(tmp_path, monkeypatch):
    """What aot_eager leaves out: the code that torch.compile generates for a forward pass."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    mixer, x = MixerCase("grfm").make(), tokens(2, 2, 3)
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(compile_threads=1):
        y = torch.compile(mixer, fullgraph=True)(x)
        torch.testing.assert_close(y, mixer(x), rtol=1e-5, atol=1e-5)


def test_exports(case):
    """torch.export with a free batch size, output as without it."""
    mixer, (w, h) = case.make().eval(), traced_grid(case)
    with torch.no_grad():
        program = exported(mixer, tokens(2, h, w))
        for batch in (1, 2, 5):
            x = tokens(batch, h, w)
            y = mixer(x)
            assert type(y) is torch.Tensor, "a traced constant stayed in a cache and spoils later passes"
            torch.testing.assert_close(program(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", [option for group in OPTION_GROUPS for option in mixer_options(group)])
def test_wrong_option_value_is_refused(option):
    group, name = option.split(".")
    values = mixer_option_values(option)
    for value in values:
        MixerOptions.from_dict({group: {name: value}})
    if isinstance(values[0], bool):
        pytest.skip("a switch")
    wrong = "no such value" if isinstance(values[0], str) else -1
    with pytest.raises(SettingError, match=f"{option}={wrong!r}"):
        MixerOptions.from_dict({group: {name: wrong}})
