"""What jobs do: make shared stages, run a trial, measure speed. Killed at any point, each goes on where it was."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from ablations.launch.job import ERROR, RESULT
from ablations.launch.progress import Status, StatusProgress
from ablations.question.chain import Chain, Chains
from ablations.question.settings import TrialSettings
from eval.models.loading import load_for_measuring
from eval.speed.flops import count_flops
from eval.stages.images import Images
from eval.stages.makers import Maker
from eval.stages.scores import Quality
from eval.stages.speed import Speed
from iris.errors import SettingError
from iris.io.files import read_json, write_json
from iris.nn.gates import record_gates
from iris.pipeline import IrisPipeline
from iris.settings import build
from iris.stages.latent import LatentStage
from iris.training.devices import process_rank
from iris.training.loop import NonFiniteLoss

GALLERY = 64  # samples kept for the report
# Of what writes files: the system, quotas, NumPy, safetensors.
FULL = ("No space left", "no space left", "quota exceeded", "requested and", "os error 28")


def run_trial(folder: str, plan: Mapping[str, Any]) -> None:
    """Run the trial of ``folder`` and leave result.json there, or error.json with the cause.

    Of several processes that share each batch, the first does everything and the others help it train.

    Args:
        plan: {"key", "settings", "runs_dir", "threads"}.
    """
    place = Path(folder)
    if process_rank() > 0:
        _prepare_process(plan["threads"])
        for stage in chain_of(plan, StatusProgress(None)).stages:
            stage.make()
        return
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock"):
        if not (place / RESULT).exists():
            with told(place) as status:
                _prepare_process(plan["threads"])
                write_json(place / "settings.json", plan["settings"])
                write_json(place / RESULT, _run(place, plan, status))


def make_shared(folder: str, plan: Mapping[str, Any]) -> None:
    """Make the stages ``plan["stages"]`` of a trial, in this order; the last one lives in ``folder``."""
    wanted = plan["stages"]
    if process_rank() > 0:
        _prepare_process(plan["threads"])
        _make(chain_of(plan, StatusProgress(None)), wanted)
        return
    with told(Path(folder)) as status:
        _prepare_process(plan["threads"])
        _make(chain_of(plan, StatusProgress(status)), wanted)


def measure_speed(folder: str, plan: Mapping[str, Any]) -> None:
    """Make the stage speed of the models of finished trials, given as {"trials": [plan, …], "machine"}."""
    with told(Path(folder)) as status:
        speed_of([chain_of(one, StatusProgress(status)) for one in plan["trials"]], plan["machine"]).make()


def speed_of(chains: list[Chain], machine: str = "") -> Speed:
    """The stage that measures the models of chains, named by their networks, the first one's first."""
    makers: dict[str, Maker] = {chain.network: chain.run.maker for chain in chains}
    run = chains[0].run
    return Speed(run.context, makers, run.measure, run.main.captions[0], machine)


def chain_of(plan: Mapping[str, Any], progress: StatusProgress) -> Chain:
    """The chain of the trial that a job is told of.

    Raises:
        SettingError: what the trial builds on is not what it was when it was planned.
    """
    chain = Chains(Path(plan["runs_dir"]), progress).of(build(TrialSettings, plan["settings"]))
    if chain.key != plan["key"]:
        raise SettingError(
            f"trial {plan['key']} is now {chain.key}: data, weights or code that it builds on have changed since it was "
            "planned; put them back or start the grid again"
        )
    return chain


@contextlib.contextmanager
def told(place: Path) -> Iterator[Status]:
    """A status file while work goes on in ``place``; a failure is written down with its cause and raised again."""
    status = Status(place)
    try:
        yield status
        (place / ERROR).unlink(missing_ok=True)
        status("done", state="done")
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk takes no error.json either: the launcher says so then
            kind = type(error).__name__
            about = {"cause": cause_of(error), "kind": kind, "message": str(error), "traceback": traceback.format_exc()}
            write_json(place / ERROR, about)
            status("failed", state="failed")
        raise


def _prepare_process(threads: int) -> None:
    """Fix the threads, so that sums are made in the same order each time."""
    torch.set_num_threads(threads)


def cause_of(error: BaseException) -> str:
    """oom, nan, timeout, disk or error."""
    if isinstance(error, NonFiniteLoss):
        return "nan"
    if "timed-out" in str(error) or "timed out" in str(error):  # submitit raises this inside the job
        return "timeout"
    if any(words in str(error) for words in FULL):
        return "disk"
    memory = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)
    return "oom" if memory else "error"


def _make(chain: Chain, wanted: list[str]) -> None:
    by_key = {stage.key: stage for stage in chain.stages}
    for key in wanted:
        by_key[key].make()


def _run(place: Path, plan: Mapping[str, Any], status: Status) -> dict[str, Any]:
    chain = chain_of(plan, StatusProgress(status))
    for stage in chain.stages:
        stage.make()
    write_json(place / "stages.json", [stage.key for stage in chain.stages])
    status("operations")
    pipeline = IrisPipeline.from_pretrained(chain.weights.place)
    images: Images = chain.run.main
    _keep_gallery(place, chain, images)
    _keep_gates(place, pipeline, chain, images.captions[:GALLERY])
    trained = chain.model.result
    return {
        "key": plan["key"],
        "metrics": metrics_of(chain) | _size(pipeline, chain, images.captions[0]),
        "seconds": seconds_of(chain),
        "steps": chain.model.training.steps,
        "environment": trained["environment"],
    }


def metrics_of(chain: Chain) -> dict[str, float]:
    """Every number of the measures without its judge's name, its standard error as NAME_se, and how many images."""
    trained = chain.model.result
    found: dict[str, float] = {"samples": len(chain.run.main.captions)}
    found |= {name: value for name, value in trained.get("metrics", {}).items() if name == "validation_loss"}
    for stage in chain.stages:
        if isinstance(stage, LatentStage):
            found["latent_psnr"] = stage.result["metrics"]["psnr"]
    for score in chain.scores:
        scores = score.scores()
        for name, number in scores.numbers.items():
            base = name.partition("/")[0]
            found[base] = number.value
            if number.standard_error is not None:
                found[f"{base}_se"] = number.standard_error
        if isinstance(score, Quality):
            found["fid_reference"] = scores.details["quality"]["real_against_real"]
    return found


def seconds_of(chain: Chain) -> dict[str, float]:
    """What the trial's own work took: training, images, measures; what it shares with others counts for each."""
    parts: dict[str, float] = {"train": chain.model.result["seconds"], "images": 0.0, "measures": 0.0}
    trained = {stage.key for stage in chain.model.chain()}
    for stage in chain.stages:
        if stage.key not in trained:
            parts["images" if isinstance(stage, Images) else "measures"] += stage.result["seconds"]
    return parts


def _size(pipeline: IrisPipeline, chain: Chain, caption: str) -> dict[str, float]:
    given = {"folder": str(chain.weights.place), "caption": caption, **vars(chain.sampling)}
    parameters = sum(p.numel() for p in pipeline.model.generator.parameters())
    operations = count_flops(load_for_measuring(given)).gflops
    return {"params_m": parameters / 1e6, "gflops": operations, "nfe": chain.sampling.evaluations}


def _keep_gallery(place: Path, chain: Chain, images: Images) -> None:
    captions = images.captions[:GALLERY]
    real = next(chain.run.data.rows(chain.run.data.split, len(captions))).images
    np.savez_compressed(
        place / "samples.npz", images=images.images()[:GALLERY], real=real, captions=np.asarray(captions)
    )


def _keep_gates(place: Path, pipeline: IrisPipeline, chain: Chain, captions: list[str]) -> None:
    iterations = chain.sampling.iterations or pipeline.model.generator.config.iterations
    with record_gates(pipeline.model.generator, iterations) as layers:
        if any(hasattr(layer.mixer, "observe") for layer in pipeline.model.generator.core):
            pipeline.generate(captions, chain.sampling, seed=0)
    if layers:
        write_json(place / "gates.json", {"layers": layers})


def finished(folder: Path) -> dict[str, Any] | None:
    """A trial's result, or None while it has none."""
    return read_json(folder / RESULT)
