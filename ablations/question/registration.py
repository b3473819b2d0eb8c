"""What is asked, written down and hashed before the first trial, and what departed from it later.

A question that is put after its answer was seen is exploratory: among many claims, margins and arms one fits by luck
(Nosek et al. 2018, "The preregistration revolution"). So the first invocation of a grid writes down the claim, arms, metric,
margin, expectations, seeds, data, judge and code. Later ones list what they do otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from iris.errors import SettingError
from iris.io.files import read_json, write_json
from iris.io.hashing import digest

if TYPE_CHECKING:
    from ablations.question.plan import Plan
    from ablations.question.settings import Settings

FOLDER = "registrations"
SEEDS_ADDED = "seeds added: "
WORDS = {"question": "the question", "claim": "the claim", "baseline": "the baseline", "match": "grid.match"}


def question_of(settings: Settings, plan: Plan, commit: str) -> dict[str, Any]:
    """What is registered, as plain values."""
    grid = settings.grid
    return {
        "grid": grid.name,
        "question": grid.question,
        "claim": grid.claim,
        "decide": dict(grid.decide),
        "arms": {arm.name: {key: str(value) for key, value in arm.values.items()} for arm in plan.arms},
        "baseline": next((arm.name for arm in plan.arms if arm.baseline), None),
        "match": grid.match,
        "seeds": list(settings.seeds),
        "data": plan.data["fingerprint"],
        "judge": {name: plan.judge.get(name) for name in ("name", "sha256")},
        "trial": digest(_common(plan)),
        "commit": commit,
    }


def _common(plan: Plan) -> dict[str, Any]:
    """The baseline's settings, as far as they say what is computed and not how."""
    kept = asdict(plan.arms[0].settings)
    return {name: value for name, value in kept.items() if name not in ("seed", "compute")}


def place_of(question: Mapping[str, Any], runs: Path) -> Path:
    """Where a question is registered: one place for a grid, data, judge and the settings that its arms share."""
    same = {name: question[name] for name in ("grid", "data", "judge", "trial")}
    return runs / FOLDER / f"{question['grid']}-{digest(same)}.json"


def sha256_of(question: Mapping[str, Any]) -> str:
    """Of the question's canonical JSON."""
    return hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()


def _read(place: Path) -> dict[str, Any] | None:
    """What is written down there; None where nothing is.

    Raises:
        SettingError: it is not what was written.
    """
    known = read_json(place)
    if known is None and not place.exists():
        return None
    if known is None or sha256_of(known.get("question", {})) != known.get("sha256"):
        raise SettingError(
            f"{place}: the registration is not what was written; put it back, or move it away to ask anew, which the report "
            "then calls exploratory"
        )
    return known


def register(question: dict[str, Any], runs: Path, finished: int, trials: int, reason: str | None) -> dict[str, Any]:
    """Write the question down unless it is, and what this invocation does otherwise; returns what is written.

    ``finished`` of ``trials`` were there already. {"question", "sha256", "when", "finished", "trials", "earlier" (how many
    registrations of this grid with other settings are older), "departures" of all invocations so far: [{"what", "reason",
    "when"}], "now": what of them is this one's}.
    """
    place = place_of(question, runs)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):  # two commands that start at once
        return _register(question, place, finished, trials, reason)


def _register(question: dict[str, Any], place: Path, finished: int, trials: int, reason: str | None) -> dict[str, Any]:
    known, when = _read(place), datetime.now(UTC).isoformat(timespec="seconds")
    if known is None:
        known = {
            "question": question,
            "sha256": sha256_of(question),
            "when": when,
            "finished": finished,
            "trials": trials,
            "earlier": len(list(place.parent.glob(f"{question['grid']}-*.json"))),
            "departures": [],
        }
        write_json(place, known)
    now, told = departures(known["question"], question), {entry["what"] for entry in known["departures"]}
    if new := [what for what in now if what not in told]:
        known["departures"] += [{"what": what, "reason": reason or "", "when": when} for what in new]
        write_json(place, known)
    return known | {"now": now}


def registered(question: Mapping[str, Any], runs: Path) -> dict[str, Any] | None:
    """What is written down of a question, with the departures that would be; nothing is written."""
    known = _read(place_of(question, runs))
    if known is not None:
        told = {entry["what"] for entry in known["departures"]}
        known["now"] = departures(known["question"], question)
        known["departures"] += [{"what": what, "reason": "", "when": ""} for what in known["now"] if what not in told]
    return known


def departures(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two questions, a sentence each."""
    return [*_of_arms(was["arms"], now["arms"]), *_of_seeds(was["seeds"], now["seeds"]), *_of_words(was, now)]


def _of_arms(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if dropped := [name for name in was if name not in now]:
        yield f"arms left out: {', '.join(dropped)}"
    if added := [name for name in now if name not in was]:
        yield f"arms added: {', '.join(added)}"
    yield from (f"arm {name} is another: {now[name]}" for name in now if name in was and was[name] != now[name])


def _of_seeds(was: list[int], now: list[int]) -> Iterator[str]:
    if added := [seed for seed in now if seed not in was]:
        after = "" if len(was) < 2 else ", a further look at the data"
        yield f"{SEEDS_ADDED}{', '.join(map(str, added))}{after}"
    if dropped := [seed for seed in was if seed not in now]:
        yield f"seeds left out: {', '.join(map(str, dropped))}"


def _of_words(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(was["decide"].keys() | now["decide"].keys()):
        before, after = was["decide"].get(name), now["decide"].get(name)
        if before != after:
            yield f"decide.{name}: {before} was registered, {after} is used"
    for name, word in WORDS.items():
        if was[name] != now[name]:
            yield f"{word}: {was[name]!r} was registered, {now[name]!r} is used"
    if was["commit"] != now["commit"]:
        yield f"the code: {was['commit']} was registered, {now['commit']} is used"
