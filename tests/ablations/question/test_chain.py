"""A trial's chain of stages: which setting changes which keys, and so what trials share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from planned import chain_from, write_rows
from small_clip import save_clip

from ablations.question.chain import Chain

MEASURES = {"quality", "alignment", "skills"}
JUDGED = {"features", *MEASURES}
IMAGES = {"images", *JUDGED}
FLOW = {"text", *IMAGES}
LATENT = {"latent", "encoded", *FLOW}


def keys(chain: Chain) -> dict[str, set[str]]:
    """Kind of stage -> the keys of those that a trial has."""
    found: dict[str, set[str]] = {}
    for stage in chain.stages:
        found.setdefault(stage.kind, set()).add(stage.key)
    return found


def changed(one: Chain, other: Chain) -> set[str]:
    """Kinds of the stages that two trials do not share."""
    ours, theirs = keys(one), keys(other)
    return {kind for kind in ours | theirs if ours.get(kind) != theirs.get(kind)}


@pytest.fixture(scope="module")
def base() -> Chain:
    return chain_from()


def test_a_chain_has_every_stage_once_and_each_after_what_it_builds_on(base):
    kinds = [stage.kind for stage in base.stages]
    assert {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} == {
        "data": 2, "latent": 1, "encoded": 2, "text": 1, "images": 2, "features": 1, "reference": 1,
        "quality": 1, "alignment": 1, "skills": 1,
    }  # fmt: skip
    before: set[str] = set()
    for stage in base.stages:
        assert {work.key for work in (*stage.needs.values(), *stage.uses.values())} <= before
        before.add(stage.key)
    assert [stage.kind for stage in base.flows] == ["text"] and base.refused == {}


def test_the_same_words_make_the_same_keys(base):
    assert changed(base, chain_from()) == set() and chain_from().key == base.key and len(base.key) == 12


@pytest.mark.parametrize(
    ("word", "kinds"),
    [
        ("data.seed=1", {"data", "reference", *LATENT}),
        ("data.train=4095", {"data", *LATENT}),
        ("latent=conv_vae", LATENT),
        ("vae.steps=7", LATENT),
        ("vae.kl_weight=1", LATENT),
        ("train.steps=901", FLOW),
        ("train.learning_rate=0.005", FLOW),
        ("train.loss_weight=odds", FLOW),
        ("model.dim=128", FLOW),
        ("model.mixer=attention", FLOW),
        ("model.mixer_width=64", FLOW),
        ("depth.norm=sandwich", FLOW),
        ("fourier.form=stock", FLOW),
        ("compute.precision=bf16", LATENT),
        ("sample.steps=3", IMAGES),
        ("sample.guidance=1.0", IMAGES),
        ("sample.sampler=heun", IMAGES),
        ("runtime.precision=fp16", IMAGES),
        ("measure.samples=100", IMAGES),
        ("measure.heldout=8", {"images", "skills"}),
        ("measure.reference=100", {"reference", "quality"}),
        ("measure.confidence=0.9", MEASURES),
        ("measure.quality.blocks=10", {"quality"}),
        ("measure.what=[quality,alignment]", {"images", "skills"}),
    ],
)
def test_a_setting_changes_what_depends_on_it_and_nothing_before(base, word, kinds):
    other = chain_from(word)
    assert changed(base, other) == kinds and other.key != base.key


@pytest.mark.parametrize(
    "word",
    [
        "launcher=slurm",
        "launcher=inline",
        "launcher.workers=7",
        "threads=5",
        "runs_dir=elsewhere",
        "reports_dir=there",
        "track.uri=sqlite:///other.db",
        "dry_run=true",
        "action=report",
        "compute.checkpoint_seconds=1",
        "compute.log_every=3",
        "compute.accumulate=2",
        "compute.validate_every=5",
        "measure.latency.rounds=5",
        "measure.latency.warmup=9",
        "measure.threads=2",
        "sample.batch=5",
        "data.path=moved",
        "preview.count=9",
        # what this chain does not read
        "student.grid=32",
        "distill.steps=7",
        "pretrain.steps=7",
        "latent.front=unshuffle",
        "latent.patch=2",
        "attention.position=none",
        "model.text_source=x",
    ],
)
def test_how_a_trial_is_run_and_what_it_does_not_read_changes_no_key(base, word):
    other = chain_from(word)
    assert changed(base, other) == set() and other.key == base.key


def test_seeds_share_the_data_and_a_latent_of_one_seed(base):
    assert changed(base, chain_from(seed=1)) == LATENT
    assert changed(*(chain_from("vae.seed=0", seed=seed) for seed in (0, 1))) == FLOW
    assert changed(base, chain_from("vae.seed=0")) == set()
    assert changed(*(chain_from("latent=haar", seed=seed) for seed in (0, 1))) == FLOW  # which learns nothing


def test_images_start_from_the_noise_of_the_trials_seed(base):
    """So an arm's sampling noise averages out over its seeds; captions and references stay the same."""
    other = chain_from(seed=1)
    assert (base.run.main.seed, other.run.main.seed) == (0, 1)
    assert base.run.main.captions == other.run.main.captions
    assert keys(base)["reference"] == keys(other)["reference"]


def test_another_judge_only_judges(base, tmp_path):
    (tmp_path / "weights.pt").write_text("x")
    clip, prefixed = (
        chain_from("judge=clip_vit_b32", f"judge.weights={tmp_path}/weights.pt", *more)
        for more in ([], ["judge.prefix=A photo of "])
    )
    assert {kind for kind in keys(base) if keys(base)[kind] == keys(clip).get(kind)} == {
        "data", "latent", "encoded", "text"
    }  # fmt: skip
    assert keys(clip)["images"] < keys(base)["images"]  # it reads no attributes, so the held-out images are not made
    assert "skills" in clip.refused and changed(clip, prefixed) == {"reference", "features", "quality", "alignment"}


def test_a_frozen_text_encoder_is_known_by_its_weights_and_embeds_once_for_all(tmp_path):
    """Embeddings hang on the captions alone: trials of another seed, rate or number of samples have them too."""
    first, other = save_clip(tmp_path / "first"), save_clip(tmp_path / "other", seed=1)
    moved = shutil.copytree(first, tmp_path / "moved")
    one, same, changed_weights = (
        chain_from("latent=haar", "model.text=clip", f"model.text_source={place}") for place in (first, moved, other)
    )
    assert changed(one, same) == set()
    assert changed(one, changed_weights) == {"captions", *FLOW}
    words = ("latent=haar", "model.text=clip", f"model.text_source={first}")
    for more, kinds in ((["train.learning_rate=0.005"], FLOW), (["measure.samples=9"], IMAGES), (["seed=0"], set())):
        assert changed(one, chain_from(*words, *more)) == kinds
    assert changed(one, chain_from(*words, seed=1)) == FLOW


def test_students_share_their_teacher(base):
    plain = chain_from("stage=distill")
    assert keys(plain)["text"] == keys(base)["text"] and changed(base, plain) == {"student", *IMAGES}
    assert [stage.kind for stage in plain.flows] == ["text", "student"]
    for word in ("student.method=shortcut", "distill.steps=7", "student.guidance=1.5"):
        assert changed(plain, chain_from("stage=distill", word)) == {"student", *IMAGES}, word
    assert changed(plain, chain_from("stage=distill", "train.steps=7")) == {"student", *FLOW}
    assert changed(plain, chain_from("stage=distill", "student.steps=1,2")) == {"student", *IMAGES}


def test_of_several_students_that_for_the_steps_makes_the_images():
    chains = [chain_from("stage=distill", *more) for more in ([], ["sample.steps=4"], ["sample.steps=1"])]
    most, four, one = chains
    assert changed(most, four) == set() and changed(four, one) == IMAGES
    student = most.model.key
    assert [chain.weights.key for chain in chains] == [student, student, f"{student}/steps-1"]
    assert [(chain.sampling.steps, chain.sampling.guidance) for chain in chains] == [(4, 1.0), (4, 1.0), (1, 1.0)]


def test_a_runtime_form_is_a_stage_of_its_own(base):
    onnx, small = chain_from("runtime=onnx"), chain_from("runtime=onnx", "runtime.precision=int8")
    assert changed(base, onnx) == {"export", *IMAGES} == changed(onnx, small)
    assert onnx.run.maker.work.needs["model"] is onnx.weights
    assert changed(onnx, chain_from("runtime=onnx", "sample.steps=3")) == IMAGES


def test_a_network_is_named_by_what_one_image_takes(base):
    """Trials of one network are measured for speed once: training changes neither time nor memory."""
    same = ("train.steps=7", "vae.steps=7", "measure.samples=9", "data.seed=1", "judge.name=shapes")
    assert {chain_from(word).network for word in same} == {base.network} == {chain_from(seed=1).network}
    other = ("model.dim=128", "sample.steps=3", "depth.norm=sandwich", "latent.width=32", "runtime=onnx")
    names = {chain_from(word).network for word in (*other, "stage=distill", "data.size=64")}
    assert len(names) == len(other) + 2 and base.network not in names


def test_a_mixer_from_outside_is_known_by_its_code(tmp_path, monkeypatch, base):
    source = (
        "from torch import nn\nclass Mean(nn.Module):\n    def __init__(self, dim, width=None):\n"
        "        super().__init__()\n        self.out = nn.Linear(dim, width or dim)\n"
    )
    (tmp_path / "keyed_mixer.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    before = chain_from("model.mixer=keyed_mixer:Mean")
    assert before.key != base.key  # known now, not when it is first asked for
    (tmp_path / "keyed_mixer.py").write_text(source + "# changed\n")
    assert changed(before, chain_from("model.mixer=keyed_mixer:Mean")) == FLOW


def test_files_are_known_by_what_they_hold(tmp_path: Path):
    first, other = write_rows(tmp_path / "first", "a"), write_rows(tmp_path / "other", "b")
    shutil.copytree(first.parent, tmp_path / "moved")

    def chain(path: Path) -> Chain:
        return chain_from("data=parquet", "data.validation=30", "measure.what=[quality]", f"data.path={path}")

    assert chain(first).key == chain(tmp_path / "moved" / first.name).key
    assert changed(chain(first), chain(other)) == set(keys(chain(first)))
