import pytest

from eval.targets import check, published, targets


def verdicts(metrics, **kwargs):
    return {result.name: result.verdict for result in check(metrics, **kwargs)}


def test_memory_is_judged_in_half_precision():
    metrics = {"weights_mb": 1000.0, "activations_mb": 99.0, "nfe": 4, "latency_ms": 12.0}
    assert verdicts(metrics) == {"memory": "pass", "ram_3gb": "needs the device", "ram_4gb": "needs the device",
                                 "nfe": "pass", "latency": "needs the device"}
    assert verdicts(metrics, dtype="float16")["memory"] == "fail"
    assert verdicts({**metrics, "activations_mb": 101.0})["memory"] == "fail"
    (memory,) = [r for r in check(metrics) if r.name == "memory"]
    assert memory.measured == "599.0 MB" and "half of 1000.0" in memory.why


def test_guidance_at_four_steps_is_too_many_evaluations():
    assert verdicts({"nfe": 8})["nfe"] == "fail"


def test_what_was_not_measured_is_not_passed():
    assert verdicts({"weights_mb": None}) == {"memory": "not measured", "ram_3gb": "not measured",
                                              "ram_4gb": "not measured", "nfe": "not measured",
                                              "latency": "needs the device"}
    assert verdicts({"weights_mb": 7000.0, "activations_mb": 0.0})["ram_3gb"] == "fail"
    with pytest.raises(ValueError, match="int4"):
        check({}, dtype="int4")


def test_file_is_complete():
    assert targets() == {"memory_mb": 600, "nfe": 4, "ram_gb": [3, 4]}
    for figure in published():
        assert figure.source and all(isinstance(getattr(figure, f), str) for f in ("steps", "latency", "memory"))
