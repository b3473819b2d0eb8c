"""Settings: from the words of a command line to checked dataclasses, to the facts of a key, and back to a text."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from typing import Any, get_type_hints

import pytest

from iris.errors import SettingError
from iris.settings import Tree, build, defaults, facts, flatten, load_yaml, parse, setting
from iris.stages.settings import SCALES, STAGES, TREE, Recipe


@dataclass(frozen=True, kw_only=True)
class Oven:
    """A group."""

    heat: float = setting(180.0, "degrees", low=0, high=300, above=True)
    minutes: int = setting(30, "how long", low=1)
    fan: bool = setting(False, "circulating air")
    mode: str = setting("top", "where from", choices=("top", "bottom", "both"))
    shelf: int | None = setting(None, "null: the middle", low=1)
    light: bool = setting(True, "to look inside", result=False)


@dataclass(frozen=True, kw_only=True)
class Cake:
    """All of them."""

    name: str = setting("sponge", "what it is called")
    note: str | None = setting(None, "on the box", result=False)
    share: int | float | None = setting(None, "of the dough", low=0)
    layers: tuple[int, ...] = setting((1, 2), "of which")
    toppings: list | None = setting(None, "on it")
    costs: dict = setting({"flour": 1}, "of what")
    oven: Oven
    second: Oven


KITCHEN = Tree(
    Cake,
    {"oven": {"gas": {"mode": "bottom"}, "hot": {"heat": 250.0, "minutes": 10}}},
    {"size": lambda: {"small": {"oven": {"minutes": 5}, "second": {"minutes": 4}}, "usual": {}}},
    {"size": "usual"},
    {"oven": {"minutes": 40}, "toppings": ["sugar"]},
    "oven.heat=200",
)


def error_of(*words: str) -> str:
    """What a command line that cannot be used is answered: one line."""
    with pytest.raises(SettingError) as caught:
        KITCHEN.build(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- composing ------------------------------------------------------------------------------------------------------


def test_without_words_there_are_the_defaults_and_what_the_command_changes():
    cake = KITCHEN.build([])
    assert (cake.name, cake.layers, cake.toppings, cake.costs) == ("sponge", (1, 2), ["sugar"], {"flour": 1})
    assert (cake.oven.minutes, cake.second.minutes) == (40, 30) and cake.oven.heat == 180.0
    cake.costs["flour"] = 9  # nobody else's
    assert KITCHEN.build([]).costs == {"flour": 1}
    assert defaults(Cake)["layers"] == [1, 2] and defaults(Cake)["oven"]["minutes"] == 30


def test_later_layers_win_wherever_their_words_stand():
    """The command's own changes, the option of a group, what reaches over several, then each setting."""
    for words in (["oven=hot", "size=small", "oven.minutes=7"], ["oven.minutes=7", "size=small", "oven=hot"]):
        for count, minutes in ((0, 40), (1, 10), (2, 5), (3, 7)):
            kept = [word for word in words if word in ("oven=hot", "size=small", "oven.minutes=7")[:count]]
            assert KITCHEN.build(kept).oven.minutes == minutes, kept
    both = KITCHEN.build(["oven=hot", "size=small"])
    assert both.oven.heat == 250.0 and both.second.minutes == 4 and both.second.heat == 180.0
    assert KITCHEN.build(["oven=hot", "oven=gas"]).oven == KITCHEN.build(["oven=gas"]).oven
    assert KITCHEN.build(["oven.heat=1", "oven.heat=2"]).oven.heat == 2.0


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("oven.minutes=7", 7),
        ("oven.minutes=010", 10),
        ("oven.heat=200", 200.0),
        ("oven.heat=1e-3", 1e-3),
        ("oven.heat=.5", 0.5),
        ("oven.fan=true", True),
        ("oven.shelf=null", None),
        ("oven.shelf=2", 2),
        ("share=0.1", 0.1),
        ("share=3", 3),
        ("layers=1,2,4", (1, 2, 4)),
        ("layers=4", (4,)),
        ("layers=[2,1]", (2, 1)),
        ("layers='1,2'", (1, 2)),
        ("toppings=nuts, no,3", ["nuts", "no", 3]),
        ("toppings=[dark chocolate,on]", ["dark chocolate", "on"]),
        ("toppings=3", [3]),
        ("toppings=", []),
        ("toppings=null", None),
        ("costs={flour: 2, egg:{white: [1,2]}}", {"flour": 2, "egg": {"white": [1, 2]}}),
        ("costs.flour=3", {"flour": 3}),
    ],
)
def test_a_value_is_read_as_its_setting_has_it(word, value):
    key = word.partition("=")[0].removesuffix(".flour")
    found = KITCHEN.build([word])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


TEXTS = [
    "a/b,c",
    "key=value",
    "it's",
    '"quoted"',
    "[x]",
    "{y: 1}",
    "grfm[fourier,recurrence]",
    "Äpfel 🍎",
    "no",
    "on",
    "3",
    "1e-3",
    "08",
    "true",
    "",
    " two  spaces ",
    "a: b # c",
    "- x",
    "!tag",
    "*",
    "~",
    "null and void",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_stands(text):
    assert KITCHEN.build([f"name={text}", f"note={text}"]).note == text
    assert parse(str, "null", "name") == "null" and parse(str | None, "null", "note") is None


def test_what_is_no_setting_names_the_key_a_close_one_and_what_is_allowed():
    assert error_of("oven.minute=3") == (
        "oven.minute is not a setting (did you mean oven.minutes?); allowed: oven.fan, oven.heat, oven.light, "
        "oven.minutes, oven.mode, oven.shelf"
    )
    everything = "allowed: layers, name, note, share, toppings, costs, oven, second, size"
    for word, close in (("nam=x", "name"), ("siz=small", "size")):
        assert error_of(word) == f"{word.partition('=')[0]} is not a setting (did you mean {close}?); {everything}"
    told = "ovn.heat is not a setting (did you mean oven.heat?); allowed: costs, layers, name, note, oven, second"
    assert error_of("ovn.heat=3").startswith(told)
    assert error_of("oven.heat.much=1").startswith("oven.heat.much is not a setting")
    assert error_of("oven=micro") == "oven='micro' is unknown; allowed: gas, hot"
    assert error_of("size=smal") == "size='smal' is unknown (did you mean small?); allowed: small, usual"
    assert error_of("second=hot") == (
        "second='hot' names a whole group; set one of second.heat, second.minutes, second.fan, second.mode, "
        "second.shelf, second.light"
    )
    assert error_of("costs.egg=1").startswith("costs.egg is not a setting")
    assert "'costs={egg.white: …}'" in error_of("costs.egg.white=1")
    assert error_of("hot") == "'hot' is no setting; write key=value, such as oven.heat=200"
    for sign in ("+", "++", "~"):
        assert error_of(f"{sign}name=x").endswith("settings are neither added nor removed; write name=value")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("oven.minutes=x", "oven.minutes='x' must be int"),
        ("oven.minutes=", "oven.minutes='' must be int"),
        ("oven.minutes=null", "oven.minutes=None must be int"),
        ("oven.minutes=1.5", "oven.minutes=1.5 must be int"),
        ("oven.minutes=1,2", "oven.minutes='1,2' must be int"),
        ("oven.minutes=true", "oven.minutes=True must be int"),
        ("oven.minutes=0", "oven.minutes=0 must be at least 1"),
        ("oven.shelf=0", "oven.shelf=0 must be at least 1"),
        ("oven.shelf=x", "oven.shelf='x' must be int or null"),
        ("oven.heat=0", "oven.heat=0.0 must be above 0"),
        ("oven.heat=301", "oven.heat=301.0 must be at most 300"),
        ("oven.heat=.nan", "oven.heat=nan must be a finite number"),
        ("oven.heat=.inf", "oven.heat=inf must be a finite number"),
        ("oven.fan=yes", "oven.fan='yes' must be bool"),
        ("oven.fan=1", "oven.fan=1 must be bool"),
        ("oven.mode=bottum", "oven.mode='bottum' is unknown (did you mean bottom?); allowed: top, bottom, both"),
        ("toppings=[1,", "toppings=[1,: it cannot be read as a list or map (expected the node content"),
        ("costs={a", "costs={a: it cannot be read as a list or map (expected ',' or '}', but got '<stream end>')"),
        ("costs.flour={", "costs.flour={: it cannot be read as a list or map"),
        ("oven.minutes=@", "oven.minutes=@: it cannot be read as a list or map"),
        ("costs=flour", "costs='flour' must be dict"),
    ],
)
def test_a_value_that_cannot_be_used_is_told(word, told):
    assert error_of(word).startswith(told)


def test_building_from_plain_values_checks_them_too():
    whole = defaults(Cake)
    assert build(Cake, whole).oven == Oven()
    for values, told in (
        (whole | {"nam": 1}, r"^nam is not a setting \(did you mean name\?\)"),
        (whole | {"oven": 3}, "^oven=3 must be a group of settings"),
        (whole | {"oven": whole["oven"] | {"heet": 1}}, r"^oven\.heet is not a setting \(did you mean heat\?\)"),
        ({"name": "x"}, "^note is missing"),
    ):
        with pytest.raises(SettingError, match=told):
            build(Cake, values)


# -- what a key is made of ------------------------------------------------------------------------------------------


def test_facts_are_what_changes_a_result():
    cake = KITCHEN.build(["note=x", "oven.light=false"])
    assert facts(cake) == facts(KITCHEN.build([])) and not {"note", "light"} & {*facts(cake), *facts(cake)["oven"]}
    assert facts(cake)["oven"] == {"heat": 180.0, "minutes": 40, "fan": False, "mode": "top", "shelf": None}
    assert facts(cake) != facts(KITCHEN.build(["second.fan=true"]))


@pytest.mark.parametrize(("default", "other"), [(1.5, 2.5), (None, "x"), ((1, 2), (1,)), ([1], [2]), ({}, {"a": 1})])
def test_a_later_setting_at_its_default_is_no_fact(default, other):
    """So that the keys from before it stay."""
    kind = make_dataclass("Later", [("old", int, setting(1)), ("new", Any, setting(default, since=2))])
    assert facts(kind()) == {"old": 1} == facts(kind(new=default))
    assert facts(kind(new=other)) == {"old": 1, "new": other}


# -- telling --------------------------------------------------------------------------------------------------------


def test_help_of_a_group_says_default_meaning_and_what_is_allowed():
    lines = KITCHEN.explain("oven")
    assert [line.split()[0] for line in lines] == [
        "oven.heat=180.0",
        "oven.minutes=40",
        "oven.fan=false",
        "oven.mode=top",
        "oven.shelf=null",
        "oven.light=true",
    ]
    assert "degrees; above 0 to 300" in lines[0] and "how long; from 1" in lines[1]
    assert "where from; one of top, bottom, both" in lines[3] and "to look inside; changes no result" in lines[5]
    overview = KITCHEN.overview()
    assert overview[:2] == ["  oven gas, hot", "  size small, usual"]
    assert any(line.startswith("Groups that --help GROUP explains: oven") for line in overview)
    for unknown in ("ovn", "name"):
        with pytest.raises(SettingError, match=f"--help {unknown}: no such group.*allowed: oven, second"):
            KITCHEN.explain(unknown)


def test_what_is_shown_is_read_back_the_same():
    composed = KITCHEN.compose(["size=small", "oven.heat=1e-3", "toppings=[a b,null,1e-3,no]", "costs={x: [1.5]}"])
    for text in TEXTS:
        values = composed | {"name": text, "note": None, "toppings": [*composed["toppings"], text]}
        assert load_yaml(KITCHEN.dump(values)) == values, text


# -- the settings of training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", TREE.words)
def test_every_option_of_every_group_composes(word):
    assert TREE.options(word)
    for option in TREE.options(word):
        assert isinstance(TREE.build([f"{word}={option}"]), Recipe)


def leaves(kind: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> field of every setting below a dataclass."""
    found = {}
    for one in fields(kind):
        hint = get_type_hints(kind)[one.name]
        found |= leaves(hint, f"{prefix}{one.name}.") if is_dataclass(hint) else {f"{prefix}{one.name}": one}
    return found


def test_every_setting_of_training_is_explained_and_reads_back():
    assert [name for name, one in leaves(TREE.kind).items() if not one.metadata.get("help")] == []
    for scale in SCALES:
        values = TREE.compose([f"scale={scale}", "data=cifar10", "start=1e3", "out=a,b"])
        assert load_yaml(TREE.dump(values)) == values
        assert flatten(values)["start"] == "1e3"


def test_what_says_how_and_where_is_no_fact_of_training():
    """Every other setting is one; the data are known by what they hold."""
    base = TREE.build([])
    for name, one in leaves(TREE.kind).items():
        group = name.partition(".")[0]
        running = group in ("compute", "preview") and name != "compute.precision"
        running |= name in ("latent.weights", "out", "runs_dir", "threads", "log", "sample.batch")
        assert one.metadata.get("result", True) is not running, name
    assert set(facts(base)) == {one.name for one in fields(base)} - {"out", "runs_dir", "threads", "log"}


def test_each_stage_has_a_group_of_its_own_training():
    recipe = TREE.build(["vae.steps=1", "pretrain.steps=2", "train.steps=3", "finetune.steps=4", "distill.steps=5"])
    assert [recipe.training(stage).steps for stage in STAGES] == [1, 2, 3, 4, 5]
    assert (recipe.vae.optimiser, recipe.train.optimiser, recipe.student.guidance) == ("adamw", "muon", 2.5)
