"""``python -m eval model=KEY``: what a training or a grid made is measured where it lies, and nothing is made twice."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import evaluation

from ablations.question.chain import Chains
from ablations.question.settings import TREE as GRID
from eval.__main__ import main
from eval.compare import loader_of
from eval.compare import main as compare
from eval.evaluate import opened
from eval.results import read_results
from eval.settings import TREE
from iris.errors import SettingError
from iris.io.progress import Progress
from iris.stages.engine import Context

pytestmark = pytest.mark.xdist_group("eval_of_a_stage")  # one worker: what the module's fixtures make is shared

TRAINING = [
    "data.train=64",
    "data.validation=48",
    "data.heldout=16",
    "latent=haar",
    "model.dim=16",
    "model.heads=2",
    "model.text_width=16",
    "train.steps=1",
    "train.batch=16",
    "distill.steps=1",
    "distill.batch=16",
    "student.steps=1,2",
    "student.grid=2",
    "preview.count=2",
]
METRICS = "measure.quality.metrics=fid,recall"
MEASURE = ["measure.samples=24", "measure.heldout=8", "measure.reference=32", METRICS]
DATA = ["data.validation=48"]


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory):
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def chain_of(*words):
    """A trial's chain, as a grid plans it."""
    return Chains(Path("runs"), Progress(quiet=True)).of(GRID.build([*TRAINING, *MEASURE, *words]))


@pytest.fixture(scope="module")
def flow(surroundings):
    """The key of a flow that was trained."""
    model = chain_of().model
    model.make()
    return model.key


@pytest.fixture(scope="module")
def student(flow):
    """The key of the students for one and two steps that were made of it."""
    model = chain_of("stage=distill").model
    model.make()
    return model.key


def test_a_grid_takes_the_images_and_scores_of_a_measured_stage_as_they_are(flow):
    words = [f"model={flow}", *DATA, *MEASURE, "measure.what=quality,alignment,skills", "track=none"]
    assert main([*words, "out=flow"]) == 0
    chain = chain_of()
    assert all(stage.done for stage in chain.stages)
    found = read_results("flow").numbers
    assert len(found) > 10 and {k: v for score in chain.scores for k, v in score.scores().numbers.items()} == found
    run = evaluation(Path("runs"), *words)
    assert run.main.key == chain.run.main.key and run.maker.sampling == chain.run.maker.sampling
    assert run.maker.sampling["steps"] == 6 and run.maker.sampling["guidance"] == 2.5  # a flow's own


@pytest.mark.parametrize(
    ("place", "planned", "words"),
    [
        ("", [], []),
        ("", ["sample.steps=2"], []),
        ("/steps-1", ["sample.steps=1"], []),
        ("", ["sample.shift=3", "sample.batch=5"], ["sample.shift=3"]),
    ],
)
def test_a_student_has_the_images_of_the_grids_student(place, planned, words, student):
    """The weights' top is the student for most steps; the others lie within."""
    chain = chain_of("stage=distill", *planned)
    run = evaluation(Path("runs"), f"model={student}{place}", *DATA, *MEASURE, *words)
    assert run.maker.work.key == f"{student}{place}" == chain.run.maker.work.key
    assert run.main.key == chain.run.main.key
    chain.run.main.make()  # by the model that the grid opens when it is its turn
    made = run.maker.opened.generate(run.main.captions, 0, 0).numpy()
    assert np.abs(chain.run.main.images().astype(int) - made).max() <= 1  # batch sizes round differently
    assert chain.run.main.result["model"]["nfe"] == run.maker.opened.settings.evaluations


def test_results_are_called_by_the_key(student, capsys):
    assert main([f"model={student}/steps-1", *DATA, *MEASURE, "measure.what=quality", "track=none"]) == 0
    (place,) = Path("eval_results").glob(f"{student}-steps-1-shapes-*")
    results = read_results(place)
    assert results.name == f"{student}-steps-1" and results.model["fingerprint"] == f"{student}/steps-1"
    assert results.model["nfe"] == 1 and f"model={student}/steps-1" in results.command
    assert loader_of(results).argument["sampler"] == results.model["sampling"]["sampler"]
    assert compare([student, str(place), *DATA, *MEASURE, "measure.what=quality", "track=none"]) == 0
    assert f"{student}-against-{place.name}.json" in capsys.readouterr().out


def test_weights_are_known_by_the_stage_that_made_them_while_they_are_as_it_made_them(student, tmp_path):
    weights = Path("runs") / "stages" / student / "weights"

    def known(place):
        return evaluation(Path("runs"), f"model={place}").maker.work.key

    assert (known(weights), known(weights / "steps-1")) == (student, f"{student}/steps-1")
    copied = tmp_path / "copy"
    shutil.copytree(weights.parent, copied)
    assert known(copied / "weights") == student  # the record lies beside them
    config = copied / "weights" / "steps-1" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"changed": "by hand"}))
    others = {known(copied / "weights"), known(config.parent)}
    assert len(others) == 2 and not others & {student, f"{student}/steps-1"}
    (copied / "result.json").unlink()
    assert known(copied / "weights") in others  # as any folder's


def test_a_latent_that_lies_elsewhere_may_change_after_the_stage(tmp_path):
    """Which its key does not tell."""
    from diffusers import AutoencoderKL

    def save(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            AutoencoderKL(
                block_out_channels=(8, 8),
                latent_channels=4,
                norm_num_groups=4,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            ).save_pretrained(tmp_path / "vae")

    save(0)
    model = chain_of("latent=pretrained", f"latent.source={tmp_path / 'vae'}").model
    model.make()
    before, again = (evaluation(Path("runs"), f"model={model.key}", *DATA).main.key for _ in range(2))
    save(1)
    assert before == again != evaluation(Path("runs"), f"model={model.key}", *DATA).main.key


@pytest.mark.parametrize("word", ["text-0123456789ab", "{student}/steps-7"])
def test_a_key_that_is_not_there_is_told_with_those_that_are(word, student):
    settings = TREE.build([f"model={word.format(student=student)}"])
    with pytest.raises(SettingError, match=f"is neither a finished stage in runs/stages nor a folder.*{student}"):
        opened(settings, Context(Path("runs"), Progress(quiet=True)))


def test_a_stage_that_makes_no_images_is_no_model(flow):
    (latent,) = [stage.key for stage in chain_of().stages if stage.kind == "latent"]
    with pytest.raises(SettingError, match="weights: model.safetensors is missing"):
        opened(TREE.build([f"model={latent}"]), Context(Path("runs"), Progress(quiet=True)))
