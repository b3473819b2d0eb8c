import pytest

from eval.speed.caps import CapResult
from eval.targets import check, published, targets


def verdicts(metrics, **kwargs):
    return {result.name: result.verdict for result in check(metrics, **kwargs)}


def test_memory_is_judged_in_half_precision():
    metrics = {"weights_mb": 1000.0, "activations_mb": 99.0, "nfe": 4, "latency_ms": 12.0}
    assert verdicts(metrics) == {
        "memory": "pass",
        "ram_3gb": "needs the device",
        "ram_4gb": "needs the device",
        "nfe": "pass",
        "latency": "needs the device",
    }
    assert verdicts(metrics, dtype="float16")["memory"] == "fail"
    assert verdicts({**metrics, "activations_mb": 101.0})["memory"] == "fail"
    (memory,) = [r for r in check(metrics) if r.name == "memory"]
    assert memory.measured == "599.0 MB" and "half of 1000.0" in memory.why


def row(cap_mb, scope, held, method="RLIMIT_DATA"):
    return CapResult(cap_mb, scope, cap_mb, method, held, 1.0, 1.0, "")


CONTROL = row(200, "control", False)
SMALL = {"weights_mb": 300.0, "activations_mb": 20.0, "nfe": 4}


def test_caps_speak_against_a_model_and_are_named():
    held = [row(cap, scope, True) for cap in (600, 3000, 4000) for scope in ("process", "above import")] + [CONTROL]
    results = {result.name: result for result in check(SMALL, "float16", held)}
    assert (results["memory"].verdict, results["ram_3gb"].verdict) == ("pass", "needs the device")
    assert "a process made an image under a cap of 600 MB (RLIMIT_DATA)" in results["memory"].why
    assert "under a cap of 3000 MB" in results["ram_3gb"].why and "shows only there" in results["ram_3gb"].why
    needs_more = [row(600, "process", False), row(600, "above import", False), row(3000, "process", False), CONTROL]
    assert verdicts(SMALL, dtype="float16", caps=needs_more) == {
        "memory": "fail",
        "ram_3gb": "fail",
        "ram_4gb": "needs the device",
        "nfe": "pass",
        "latency": "needs the device",
    }
    assert verdicts({}, dtype="float16", caps=needs_more)["ram_3gb"] == "fail"


def test_beside_its_runtime_is_enough():
    caps = [row(600, "process", False), row(600, "above import", True), CONTROL]
    result = check(SMALL, "float16", caps)[0]
    assert result.verdict == "pass" and "could not make an image under a cap of 600 MB" in result.why
    assert "beside its runtime's import, made an image" in result.why


def test_caps_say_nothing_of_another_dtype_nor_without_a_control():
    fails = [row(600, "above import", False), row(3000, "process", False)]
    assert verdicts(SMALL, dtype="float32", caps=[*fails, CONTROL])["memory"] == "pass"
    assert verdicts(SMALL, dtype="float16", caps=fails) == verdicts(SMALL, dtype="float16")
    held = row(200, "control", True)
    assert verdicts(SMALL, dtype="float16", caps=[*fails, held]) == verdicts(SMALL, dtype="float16")
    assert (
        verdicts(SMALL | {"weights_mb": 700.0}, dtype="float16", caps=[row(600, "process", True), CONTROL])["memory"]
        == "fail"
    )


def test_guidance_at_four_steps_is_too_many_evaluations():
    assert verdicts({"nfe": 8})["nfe"] == "fail"


def test_what_was_not_measured_is_not_passed():
    assert verdicts({"weights_mb": None}) == {
        "memory": "not measured",
        "ram_3gb": "not measured",
        "ram_4gb": "not measured",
        "nfe": "not measured",
        "latency": "needs the device",
    }
    assert verdicts({"weights_mb": 7000.0, "activations_mb": 0.0})["ram_3gb"] == "fail"
    with pytest.raises(ValueError, match="int4"):
        check({}, dtype="int4")


def test_file_is_complete():
    assert targets() == {"memory_mb": 600, "nfe": 4, "ram_gb": [3, 4]}
    systems = " ".join(figure.system for figure in published())
    for name in (
        "SnapGen",
        "MobileDiffusion",
        "SnapFusion",
        "BK-SDM",
        "SDXL (Apple)",
        "Qualcomm",
        "Xiaomi",
        "SD-Turbo",
    ):
        assert name in systems
    assert len({tuple(vars(figure).values()) for figure in published()}) == len(published())
    for figure in published():
        assert figure.source and all(isinstance(getattr(figure, f), str) for f in ("steps", "latency", "memory"))
