"""The spec: what is right comes back equal, what is wrong is told with its place."""

import dataclasses
import enum
import functools
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from rewrite.contract import Pass
from rewrite.errors import SpecError
from rewrite.spec.parse import Spec, Step, builtin_names, pass_of


class Side(enum.Enum):
    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True)
class Rosa(Pass):
    """A pass of the tests, with an option of every kind.

    rank: of the update. alpha: its scale is
    alpha/rank, see rank.
    """

    rank: Annotated[int, Field(ge=1)]
    alpha: float = 16.0
    kind: Literal["narrow", "wide"] = "narrow"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    start: int | None = None
    tag: str = ""
    strict: bool = False
    side: Side = Side.LEFT
    json: dict[str, float] = dataclasses.field(default_factory=dict)

    role = "linear"
    example = {"where": "attention.{q,v}", "rank": 4}

    def __post_init__(self):
        if self.tag == "bad":
            raise ValueError('tag "bad" is not a good tag')

    def params(self, w):
        return {}


@dataclass(frozen=True)
class Still(Pass):
    """A whole-graph pass."""

    def apply(self, graph, sites):
        return None


PASSES = (Rosa, Still)


def parse(*steps, **keys):
    return Spec.parse({"passes": list(steps), **keys}, PASSES)


def fault(*steps, **keys):
    """The message of the SpecError that a spec must raise."""
    with pytest.raises(SpecError) as caught:
        parse(*steps, **keys)
    return str(caught.value)


@functools.cache
def of_the_schema():
    return jsonschema.Draft202012Validator(Spec.schema(PASSES))


def rosa(**options):
    return {"pass": "rosa", "rank": 4, **options}


# -- what is right -------------------------------------------------------------------------------------------------------------------


def test_a_step_carries_the_pass_where_name_and_place():
    spec = parse(rosa(where="mlp.*", name="fr", allow_refusals=True, alpha=8, sizes=[3, 4]), {"pass": "still"}, seed=5)
    assert spec.seed == 5
    assert spec.passes[0] == Step("rosa", Rosa(4, alpha=8.0, sizes=(3, 4)), "mlp.*", "fr", True)
    assert [s.place for s in spec.passes] == ["passes[0]", "passes[1]"]
    assert spec.passes[1] == Step("still", Still(), None)


def test_where_is_the_role_of_the_pass_unless_said():
    assert parse(rosa()).passes[0].where == "linear"


def test_a_spec_is_handed_back_as_it_is():
    spec = parse(rosa())
    assert Spec.parse(spec) is spec


def test_a_path_is_read_and_named_in_messages(tmp_path):
    file = tmp_path / "lora.json"
    file.write_text(json.dumps({"passes": [rosa(rank="8")]}))
    with pytest.raises(SpecError) as caught:
        Spec.parse(str(file), PASSES)
    assert str(caught.value) == f'{file}: passes[0].rank: expected int, got "8"'
    file.write_text("\ufeff" + json.dumps({"passes": [rosa()]}), encoding="utf-8")  # the mark that some editors write
    assert Spec.parse(file, PASSES) == parse(rosa())
    assert Spec.parse(file, PASSES).source == str(file)


@settings(deadline=None)  # a busy machine is no fault
@given(
    rank=st.integers(1, 2**70),
    alpha=st.floats(allow_nan=False, allow_infinity=False),
    kind=st.sampled_from(["narrow", "wide"]),
    sizes=st.lists(st.integers()),
    start=st.none() | st.integers(),
    tag=st.text(st.characters(exclude_categories=["Cs"])).filter(lambda t: t != "bad"),
    side=st.sampled_from(["left", "right"]),
    table=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False, allow_infinity=False)),
    name=st.from_regex(r"\A[a-z]{3}_[0-9]{1,3}\Z"),
    seed=st.integers(0, 2**63 - 1),
)
def test_round_trip(rank, alpha, kind, sizes, start, tag, side, table, name, seed):
    first = rosa(rank=rank, alpha=alpha, kind=kind, sizes=sizes, start=start, tag=tag, side=side, json=table, name=name)
    spec = parse(first, {"pass": "still"}, seed=seed)
    again = Spec.parse(json.loads(spec.to_json()), PASSES)
    assert again == spec
    assert again.to_json() == spec.to_json()
    of_the_schema().validate(spec.to_dict())


def test_defaults_are_left_out():
    spec = parse(rosa(where="linear", alpha=16.0, kind="narrow", name="default", allow_refusals=False), {"pass": "still"}, seed=0)
    assert spec.to_dict() == {"passes": [{"pass": "rosa", "rank": 4}, {"pass": "still"}]}
    full = spec.to_dict(full=True)
    assert full["seed"] == 0 and full["passes"][0]["alpha"] == 16.0 and full["passes"][0]["where"] == "linear"
    assert Spec.parse(full, PASSES) == spec
    assert Spec().to_dict() == {"passes": []}
    assert Spec.parse(json.loads(Spec().to_json())) == Spec()


def test_an_option_may_be_called_parallel():
    @dataclass(frozen=True)
    class Beside(Pass):
        parallel: bool = False
        role = "mlp"

    assert Spec.parse({"passes": [{"pass": "beside", "parallel": True}]}, [Beside]).passes[0].options.parallel


def test_specs_that_ask_for_the_same_are_equal_and_others_are_not():
    assert parse(rosa()) == parse(rosa(alpha=16))
    assert hash(parse({"pass": "still"})) == hash(parse({"pass": "still"}))
    for other in (rosa(rank=5), rosa(where="mlp.*"), rosa(name="fr"), rosa(allow_refusals=True)):
        assert parse(rosa()) != parse(other)


# -- what is wrong -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "8"}, 'passes[0].rank: expected int, got "8"'),
        ({"rank": 8.0}, "passes[0].rank: expected int, got 8.0"),
        ({"rank": True}, "passes[0].rank: expected int, got true"),
        ({"rank": None}, "passes[0].rank: expected int, got null"),
        ({"rank": 0}, "passes[0].rank: expected int ≥ 1, got 0"),
        ({"rank": -3}, "passes[0].rank: expected int ≥ 1, got -3"),
        ({"alpha": float("nan")}, "passes[0].alpha: expected a finite number, got NaN"),
        ({"alpha": float("inf")}, "passes[0].alpha: expected a finite number, got Infinity"),
        ({"rank": float("nan")}, "passes[0].rank: expected a finite number, got NaN"),
        ({"alpha": "16"}, 'passes[0].alpha: expected number, got "16"'),
        ({"alpha": False}, "passes[0].alpha: expected number, got false"),
        ({"kind": "Wide"}, 'passes[0].kind: expected one of "narrow", "wide", got "Wide"'),
        ({"side": "up"}, 'passes[0].side: expected one of "left", "right", got "up"'),
        ({"sizes": [3, "4"]}, 'passes[0].sizes[1]: expected int, got "4"'),
        ({"sizes": 3}, "passes[0].sizes: expected list of int, got 3"),
        ({"pair": [3, "x"]}, 'passes[0].pair[1]: expected number, got "x"'),
        ({"pair": [3]}, "passes[0].pair: expected list of 2 items: int, number, got [3]"),
        ({"start": 1.5}, "passes[0].start: expected int or null, got 1.5"),
        ({"strict": 1}, "passes[0].strict: expected true or false, got 1"),
        ({"tag": 7}, "passes[0].tag: expected string, got 7"),
        ({"tag": "\ud800"}, "passes[0]: a string holds a character that is not Unicode"),
        ({"tag": "bad"}, 'passes[0]: rosa: tag "bad" is not a good tag'),
        ({"json": []}, "passes[0].json: expected object, got []"),
        ({"where": 3}, "passes[0].where: expected a role, an object or a list of these, got 3. For example \"attention.{q,v}\"."),
        ({"where": {"role": "linear", "expect": 0}}, "passes[0].where.expect: expected a whole number above 0, got 0."),
        ({"name": "a.b"}, 'passes[0].name: "a.b" cannot be part of a parameter\'s name. Use letters, digits and _.'),
        ({"name": "class"}, 'passes[0].name: "class" cannot be part of a parameter\'s name. Use letters, digits and _.'),
        ({"name": "training"}, 'passes[0].name: "training" is a name that every torch module has already. Choose another.'),
        ({"name": 4}, "passes[0].name: expected string, got 4"),
        ({"allow_refusals": 1}, "passes[0].allow_refusals: expected true or false, got 1"),
    ],
)
def test_a_wrong_value_is_told_with_its_place(options, message):
    assert fault(rosa(**options)) == message


def test_an_unknown_option_lists_the_closest_and_all():
    message = fault(rosa(rnak=3))
    assert message.startswith('passes[0]: "rnak" is not an option of rosa. Did you mean "rank"? Options: rank, alpha, kind, ')
    assert "It has no options." in fault({"pass": "still", "rank": 3})


def test_a_missing_option_says_what_it_is():
    assert fault({"pass": "rosa"}) == 'passes[0]: rosa needs "rank" (int ≥ 1)'


def test_an_unknown_pass_lists_the_closest_and_all():
    message = fault({"pass": "still"}, {"pass": "rossa", "rank": 3})
    assert message.startswith('passes[1]: "rossa" is not a pass. Did you mean "rosa"? Passes: ')
    assert "rosa" in fault({"pass": "ROSA"})
    assert "Did you mean" not in fault({"pass": "entirely_else"})


def test_an_unknown_role_lists_the_closest_and_all():
    message = fault(rosa(where=["linear", "atention.{q,v}"]))
    assert message.startswith('passes[0].where[1]: "atention.q" is not a role. Did you mean "attention.q"')
    assert "mlp.down" in message


def test_a_pass_without_sites_or_tensors_takes_no_where_and_no_name():
    assert fault({"pass": "still", "where": "linear"}) == 'passes[0]: still works on the whole graph and takes no "where". Leave it out.'
    assert fault({"pass": "still", "name": "fr"}) == 'passes[0]: still works on the whole graph and takes no "name". Leave it out.'
    assert not jsonschema.Draft202012Validator(Spec.schema(PASSES)).is_valid({"passes": [{"pass": "still", "name": "fr"}]})


def test_a_pass_without_a_usual_place_needs_a_where():
    @dataclass(frozen=True)
    class Anywhere(Pass):
        def output(self, y):
            return y

    with pytest.raises(SpecError, match='passes\\[0\\]: anywhere needs "where"'):
        Spec.parse({"passes": [{"pass": "anywhere"}]}, [Anywhere])
    assert Spec.parse({"passes": [{"pass": "anywhere", "where": "mlp"}]}, [Anywhere]).passes[0].where == "mlp"


def test_every_mistake_is_told_at_once():
    lines = fault(rosa(rank="8", alpha=None), {"pass": "rossa"}, rosa(name="x.y"), seed=-1, sed=3).splitlines()
    assert lines[0] == '"sed" is not a key of a spec. Did you mean "seed"? Keys: seed, passes.'
    assert [line.split(":")[0] for line in lines[1:]] == ["seed", "passes[0].rank", "passes[0].alpha", "passes[1]", "passes[2].name"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], 'expected an object such as {"passes": […]}, got []'),
        ({}, '"passes" is missing: the list of passes, in the order in which they run'),
        ({"passes": {"pass": "rosa"}}, 'passes: expected list, got {"pass": "rosa"}'),
        ({"passes": ["rosa"]}, 'passes[0]: expected an object such as {"pass": "lora", …}, got "rosa"'),
        ({"passes": [[]]}, 'passes[0]: expected an object such as {"pass": "lora", …}, got []'),
        ({"passes": [{"rank": 3}]}, 'passes[0]: "pass" is missing: the name of the pass.'),
        ({"passes": [{"pas": "rosa"}]}, 'passes[0]: "pass" is missing: the name of the pass. Did you mean "pass"?'),
        ({"passes": [{"pass": 3}]}, "passes[0].pass: expected string, got 3"),
        ({"passes": [], "seed": True}, "seed: expected int from 0 to 2⁶³-1, got true"),
        ({"passes": [], "seed": 2**63}, f"seed: expected int from 0 to 2⁶³-1, got {2**63}"),
        ({"passes": [{"parallel": []}]}, "passes[0].parallel: expected list of at least 2 steps, got []"),
        ({"passes": [{"choose": 3, "by": {"pass": "adapter_fusion"}}]}, "passes[0].choose: expected list of at least 1 step, got 3"),
        ({"passes": [{"pass": "rosa", 3: 4}]}, "passes[0]: a key must be a string, got 3"),
        ({"passes": [{"pass": "rosa", "rank": 3 + 0j}]}, "passes[0].rank: expected a JSON value, got builtins.complex"),
    ],
)
def test_a_wrong_form_is_told(value, message):
    with pytest.raises(SpecError) as caught:
        Spec.parse(value, PASSES)
    assert str(caught.value) == message


def test_a_loop_in_a_python_value_is_told():
    value = {"passes": []}
    value["passes"].append(value)
    with pytest.raises(SpecError, match="nested too deeply"):
        Spec.parse(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"passes": [}', "not JSON: line 1, column 13: Expecting value"),
        (b'{"passes": [],\n "seed" 3}', "not JSON: line 2, column 9"),
        (b"", "not JSON: line 1, column 1: Expecting value"),
        (b'{"passes": [], "passes": []}', 'the key "passes" stands twice in one object. Keep one.'),
        (b'{"passes": "\xff"}', "not UTF-8 text (byte 12). A spec is a JSON file."),
        (b'{"passes": [], "seed": NaN}', "seed: expected int from 0 to 2⁶³-1, got NaN"),
        (b"[" * 100_000, "nested too deeply to be a spec"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON that can be read: Exceeds the limit"),
    ],
)
def test_a_file_that_is_no_spec_is_told(tmp_path, content, message):
    file = tmp_path / "spec.json"
    file.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        Spec.parse(file)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(SpecError, match="cannot be read"):
            Spec.parse(path)


def test_steps_that_would_make_the_same_tensors_collide():
    message = fault(rosa(), {"pass": "rosa", "rank": 8})
    assert message == 'passes[1]: "rosa" stands at "linear" already (passes[0]) under the name "default". Give one of them another "name".'
    assert len(parse(rosa(), rosa(name="fr")).passes) == 2
    assert len(parse(rosa(), rosa(where="head")).passes) == 2
    assert len(parse(rosa(), {"pass": "still"}, rosa()).passes) == 3  # merged in between: begin again under the same name


# -- where passes come from ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder on the Python path, for modules with passes in them."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


SOURCE = """
from dataclasses import dataclass
from rewrite.contract import Pass

@dataclass(frozen=True)
class Tiny(Pass):
    size: int = 3
    role = "linear"
"""


def test_a_dotted_name_is_imported_as_it_stands(lab):
    (lab / "mylab").mkdir()
    (lab / "mylab" / "tiny.py").write_text(SOURCE)
    spec = Spec.parse({"passes": [{"pass": "mylab.tiny", "size": 4}]})
    assert spec.passes[0].options.size == 4
    assert Spec.parse(json.loads(spec.to_json())) == spec


def test_a_closed_parse_imports_nothing_but_takes_what_is_handed_over(lab):
    (lab / "mylab").mkdir()
    (lab / "mylab" / "tiny.py").write_text(SOURCE + "\nopen(__file__ + '.ran', 'w')")
    value = {"passes": [{"pass": "mylab.tiny"}]}
    with pytest.raises(SpecError, match="may not have code imported"):
        Spec.parse(value, imports=False)
    assert not list(lab.glob("mylab/*.ran")) and "mylab.tiny" not in sys.modules
    import mylab.tiny

    assert Spec.parse(value, [mylab.tiny], imports=False) == Spec.parse(value, [mylab.tiny.Tiny], imports=False) == Spec.parse(value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 3", '"mylab.odd" defines no pass'),
        (SOURCE + SOURCE.replace("Tiny", "Other"), '"mylab.odd" defines 2 passes (Tiny, Other)'),
        ("import nothing_of_this_name", '"mylab.odd" cannot be imported: ModuleNotFoundError'),
        ("def", '"mylab.odd" cannot be imported: SyntaxError'),
        (SOURCE.replace("@dataclass(frozen=True)", ""), "Tiny is not a frozen dataclass"),
        (SOURCE.replace("size", "where"), 'has an option called "where"'),
        (SOURCE.replace("size: int = 3", "size: type(print) = None"), "an option of Tiny has a type that JSON cannot hold"),
        (SOURCE + "    drfit = 1e-6", 'Tiny defines "drfit", which nothing reads. Did you mean "drift"?'),
        (SOURCE + "    def ouput(self, y):\n        return y", 'Tiny defines "ouput", which nothing reads. Did you mean "output"?'),
        (SOURCE + "    def befor_forward(self, sites):\n        pass", 'Did you mean "before_forward"? What a pass has for itself begins with _.'),
        ("from __future__ import annotations\n" + SOURCE.replace("int = 3", "nowhere = 3"), "an option of Tiny has a type that JSON cannot hold"),
    ],
)
def test_a_module_that_is_no_pass_is_told(lab, source, message):
    (lab / "mylab").mkdir()
    (lab / "mylab" / "odd.py").write_text(source)
    with pytest.raises(SpecError) as caught:
        Spec.parse({"passes": [{"pass": "mylab.odd"}]})
    assert message in str(caught.value) and str(caught.value).startswith("passes[0]: ")


def test_a_module_that_is_not_there_is_told():
    for name in ("mylab.nowhere", "..rosa", "os.path", "a b.c", ""):
        with pytest.raises(SpecError, match="passes\\[0\\]"):
            Spec.parse({"passes": [{"pass": name}]})


def test_an_entry_point_adds_a_pass(lab):
    (lab / "tiny_of_others.py").write_text(SOURCE)
    info = lab / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rewrite.passes]\ntiny = tiny_of_others\nbroken = tiny_of_others:Nothing\n")
    assert Spec.parse({"passes": [{"pass": "tiny"}]}).passes[0].options.size == 3
    with pytest.raises(SpecError, match='"broken" cannot be imported'):
        Spec.parse({"passes": [{"pass": "broken"}]})
    with pytest.raises(SpecError, match="may not have code imported"):
        Spec.parse({"passes": [{"pass": "tiny"}]}, imports=False)


def test_what_is_handed_over_must_be_a_pass():
    for given_ in (3, ModuleType("empty"), int):
        with pytest.raises(SpecError):
            Spec.parse({"passes": []}, [given_])


# -- the built-in passes and the schema ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", builtin_names())
def test_every_built_in_pass_parses_its_example_and_round_trips(name):
    spec = Spec.parse({"passes": pass_of(importlib.import_module(f"rewrite.passes.{name}")).shown(name)})
    assert Spec.parse(json.loads(spec.to_json())) == spec
    jsonschema.validate(spec.to_dict(), Spec.schema())


def test_the_schema_is_a_schema_and_agrees_with_the_parser():
    schema = Spec.schema(PASSES)
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = jsonschema.Draft202012Validator(schema).is_valid
    for good in (rosa(where={"role": "linear"}, side="right"), {"pass": "my.own", "anything": 3}):
        assert valid({"passes": [good], "$schema": "x"}), good
    for bad in (rosa(rank="8"), rosa(rank=0), rosa(rnak=3), rosa(kind="x"), rosa(where=3), rosa(name="a.b"), {"pass": "rosa"}, {"pass": "rossa"}, {}):
        assert not valid({"passes": [bad]}), bad
    assert not valid([]) and not valid({"seed": -1, "passes": []}) and not valid({"passes": [], "sed": 3})


def test_the_schema_documents_each_pass():
    schema = Spec.schema(PASSES)
    part = schema["$defs"]["pass.rosa"]
    assert part["properties"]["rank"] == {"minimum": 1, "type": "integer", "description": "of the update."}
    assert part["properties"]["alpha"] == {"default": 16.0, "type": "number", "description": "its scale is alpha/rank, see rank."}
    assert "description" not in part["properties"]["kind"]
    assert part["properties"]["where"]["default"] == "linear"
    assert part["examples"] == [{"pass": "rosa", "where": "attention.{q,v}", "rank": 4}]
    assert set(builtin_names()) <= {key.removeprefix("pass.") for key in schema["$defs"]}


def test_the_schema_in_docs_is_the_one_of_the_code():
    file = Path(__file__).parent.parent / "docs" / "spec.schema.json"
    assert json.loads(file.read_text()) == Spec.schema(), "docs/spec.schema.json is old. Write it anew: rewrite schema > docs/spec.schema.json"
