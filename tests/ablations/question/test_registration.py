"""What is registered before the first trial, and what is listed as a departure from it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from planned import plan_of, settings_from

from ablations.question.registration import FOLDER, departures, question_of, register, registered, sha256_of
from iris.errors import SettingError

WORDS = ("grid=mixers", "scale=smoke", "latent=pixel", "seeds=[0,1,2]")


def question(*words: str, commit: str = "0123456789") -> dict[str, Any]:
    return question_of(settings_from(*WORDS, *words), plan_of(*WORDS, *words), commit)


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    return question()


def test_it_is_written_once_before_the_first_trial(asked, tmp_path):
    first = register(asked, tmp_path, 0, 4, None)
    again = register(asked, tmp_path, 3, 4, "later")
    assert (
        first == again
        and first["finished"] == 0
        and first["now"] == []
        and first["departures"] == []
        and first["earlier"] == 0
    )
    (file,) = (tmp_path / FOLDER).glob("*.json")
    assert json.loads(file.read_text()) | {"now": []} == first and first["sha256"] == sha256_of(asked)
    assert {"question", "claim", "decide", "arms", "baseline", "seeds", "data", "judge", "commit"} <= asked.keys()


def test_a_report_alone_registers_nothing(asked, tmp_path):
    assert registered(asked, tmp_path) is None and not (tmp_path / FOLDER).exists()
    register(asked, tmp_path, 2, 4, None)
    assert registered(asked | {"seeds": [0, 1, 2, 3]}, tmp_path)["departures"][0]["what"].startswith("seeds added: ")
    assert registered(asked, tmp_path)["departures"] == [] and registered(asked, tmp_path)["finished"] == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": [0, 1, 5]}, "seeds added: 5, a further look at the data"),
        ({"seeds": [0, 1]}, "seeds left out: 2"),
        ({"claim": "the contrary"}, "the claim: .* was registered, 'the contrary' is used"),
        ({"decide": {"metric": "kid"}}, "decide.metric: fid was registered, kid is used"),
        ({"commit": "abc+changes"}, "the code: 0123456789 was registered, abc.changes is used"),
        ({"match": "flops"}, "grid.match"),
        ({"arms": {}}, "arms left out: "),
        ({"arms": {"new": {}}}, "arms added: new"),
    ],
)
def test_departures_are_listed_once_with_their_reason(asked, tmp_path, change, words):
    register(asked, tmp_path, 0, 4, None)
    for reason in ("a reviewer asked", "another"):
        found = register(asked | change, tmp_path, 0, 4, reason)
    told = [entry for entry in found["departures"] if re.search(words, entry["what"])]
    assert len(told) == 1 and told[0]["reason"] == "a reviewer asked" and told[0]["when"]
    assert found["question"] == asked


def test_other_settings_of_all_arms_are_another_question_that_says_it_is_not_the_first(tmp_path):
    one, other = question("train.steps=3"), question("train.steps=4")
    register(one, tmp_path, 0, 4, None)
    assert register(other, tmp_path, 0, 4, None)["earlier"] == 1
    how = question("train.steps=3", "launcher.workers=1", "threads=1")
    assert departures(one, how) == [] and register(how, tmp_path, 0, 4, None)["earlier"] == 0


@pytest.mark.parametrize("damage", [lambda text: text.replace("5%", "8%"), lambda text: "{", lambda text: "{}"])
def test_what_was_altered_is_not_believed(asked, tmp_path, damage):
    register(asked, tmp_path, 0, 4, None)
    (file,) = (tmp_path / FOLDER).glob("*.json")
    file.write_text(damage(file.read_text()))
    for look in (lambda: register(asked, tmp_path, 0, 4, None), lambda: registered(asked, tmp_path)):
        with pytest.raises(SettingError, match="is not what was written; put it back"):
            look()


def test_what_another_run_did_is_told_apart_from_what_this_one_does(asked, tmp_path):
    register(asked, tmp_path, 0, 4, None)
    register(asked | {"decide": asked["decide"] | {"practical": "10%"}}, tmp_path, 0, 4, None)
    now = register(asked, tmp_path, 4, 4, None)
    assert len(now["departures"]) == 1 and now["now"] == []
