"""IRIS on a phone's runtimes: seconds, memory by part, and the memory caps under which an image is made.

    python -m benchmarks.mobile work=DIR                                    # everything, then the report
    python -m benchmarks.mobile work=DIR phase=export presets=tiny          # one phase, some of it

The presets at 256x256, 4 steps of 4 and of 8 iterations, no guidance, in PyTorch, ONNX Runtime and ExecuTorch. Weights
are drawn, the text encoder's too, which has CLIP ViT-L/14's shape: that tells cost, not quality. What 8-bit weights do to
quality is measured on the small trained model that is shipped. Phases, each of which goes on where it was stopped:

    export      write the files and compare their images with PyTorch's (minutes to hours, no quiet machine needed)
    mixers      each mixer alone in ExecuTorch, against PyTorch
    coreml      convert to Core ML, where coremltools is installed
    quality     Fréchet distance after 8-bit weights, on the shipped model
    memory      peak memory in fresh processes, whole and by part, and runs under caps
    latency     time, runtimes in turn; on a quiet machine
    report      reports/mobile/: results.csv, report.md, index.html

Words, with their defaults:

    work=               files and rows, several GB; required
    phase=all           one, or several with commas
    presets=tiny,small,base  runtimes=pytorch,onnx,executorch  iterations=4,8
    rounds=10           of latency; threads=0: as many as there are processors
    samples=2000        pictures of quality
    out=reports/mobile
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from benchmarks.mobile.plan import PHASES, Plan
from iris.errors import SettingError


def phases() -> dict[str, Callable[[Plan], None]]:
    """What does each phase; imported here, since each brings libraries that take seconds."""
    from benchmarks.mobile import export, measure, report

    return {
        "export": export.export,
        "mixers": export.mixers,
        "coreml": export.coreml,
        "quality": measure.quality,
        "memory": measure.memory,
        "latency": measure.latency,
        "report": report.write_report,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Run the phases of a command line; bad input ends it with one line."""
    try:
        plan = Plan.of(sys.argv[1:] if words is None else words)
        todo = phases()
        for name in PHASES:
            if name in plan.phase:
                todo[name](plan)
    except SettingError as error:
        raise SystemExit(f"python -m benchmarks.mobile: {error}") from None


if __name__ == "__main__":
    main()
