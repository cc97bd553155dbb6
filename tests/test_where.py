"""`where` in a spec: what it picks, what it says when it picks nothing, and how it is refused when it is malformed."""

import re
from dataclasses import replace
from fractions import Fraction

import pytest

from rewrite.errors import Refused, SpecError
from rewrite.roles.find import Roles, roles
from rewrite.roles.where import REGIONS, ROLES, parse, select
from tests.models import captured


@pytest.fixture(scope="module")
def llama():
    return roles(captured("llama"))


def picked(found, where, **more):
    return [site.path for site in select(found, where, **more)]


def test_roles_with_braces_and_stars(llama):
    assert picked(llama, "attention.{q,v}") == [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"]
    assert picked(llama, "mlp.*") == [f"model.layers.{i}.mlp.{x}_proj" for i in (0, 1) for x in ("gate", "up", "down")]
    assert len(select(llama, "linear")) == 14 and "lm_head" not in picked(llama, "linear")
    assert not {site.role for site in select(llama, "*")} & set(REGIONS)


def test_a_star_does_not_take_a_fused_weight_twice():
    found = roles(captured("gpt2"))
    assert {site.role for site in select(found, "attention.*")} == {"attention.q", "attention.k", "attention.v", "attention.o"}
    assert picked(found, "attention.qkv") == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]


@pytest.mark.parametrize(
    "path, count",
    [
        ("layers.0.**", 7),
        ("layers.{0..1}.**", 14),
        ("layers.{0,1}.self_attn.*", 8),
        ("model.layers.1.mlp.{up,down}_proj", 2),
        ("*.q_proj", 2),
        ("q_*", 2),
        ("**.mlp.**", 6),
        (["layers.0.mlp.*", "layers.1.self_attn.*"], 7),
    ],
)
def test_paths(llama, path, count):
    assert len(select(llama, {"role": "linear", "path": path})) == count
    assert len(select(llama, {"path": path})) == count  # the default role is linear


def test_a_path_stops_at_the_borders_of_names(llama):
    for path in ("ayers.0.**", "layers.0", "self_attn.q", "layers.*", "model.*.self_attn.q_proj"):
        with pytest.raises(Refused):
            select(llama, {"role": "linear", "path": path})


SPINDLE = ("0..1/6", "1/6..1/2", "1/2..5/6", "5/6..1")


@pytest.mark.parametrize("blocks, sizes", [(4, [1, 1, 1, 1]), (6, [1, 2, 2, 1]), (12, [2, 4, 4, 2]), (32, [5, 11, 11, 5])])
def test_parts_of_the_depth_share_out_all_blocks(llama, blocks, sizes):
    (one,) = select(llama, {"role": "mlp", "path": "layers.0.**"})
    stack = Roles(replace(one, index=i, block=f"layers.{i}", depth=Fraction(2 * i + 1, 2 * blocks)) for i in range(blocks))
    groups = [[site.index for site in select(stack, {"role": "mlp", "depth": part})] for part in SPINDLE]
    assert [len(group) for group in groups] == sizes and sum(groups, []) == [*range(blocks)]


def test_depth_counts_each_stack_by_itself(llama):
    assert picked(llama, {"role": "attention.q", "depth": "0..1/2"}) == ["model.layers.0.self_attn.q_proj"]
    assert picked(llama, {"depth": "0.5..1"}, default="norm") == [f"model.layers.1.{name}_layernorm" for name in ("input", "post_attention")]  # none beyond the stack
    found = roles(captured("t5"))
    assert {site.block for site in select(found, {"role": "mlp", "depth": "0..1/2"})} == {"encoder.block.0", "decoder.block.0"}


def test_not_takes_away(llama):
    assert picked(llama, {"role": "linear", "not": "mlp.*"}) == picked(llama, "attention.*")
    assert picked(llama, {"role": "linear", "not": {"path": "layers.1.**"}}) == picked(llama, {"path": "layers.0.**"})
    assert picked(llama, {"role": "linear", "not": ["mlp.*", {"role": "attention.q", "path": "layers.0.**"}]}) == picked(llama, "attention.*")[1:]


def test_a_list_is_either_and_no_site_comes_twice(llama):
    sites = select(llama, ["attention.q", "linear", {"role": "norm", "path": "model.norm"}])
    assert len(sites) == len(set(sites)) == 15
    assert sites == sorted(sites, key=lambda site: llama.sites.index(site))


def test_expect(llama):
    assert len(select(llama, {"role": "attention.q", "expect": 2})) == 2
    with pytest.raises(Refused, match=r"found 2 sites for .*, expected 3\.  This model has: attention"):
        select(llama, {"role": "attention.q", "expect": 3})
    with pytest.raises(Refused, match="found 2 sites .* expected 1"):
        select(llama, ["linear", {"role": "attention.q", "expect": 1}])
    assert len(select(llama, {"role": "attention.q", "expect": 3}, strict=False)) == 2


def test_nothing_found_says_what_there_is(llama):
    with pytest.raises(Refused, match=re.escape('found no site for "conv".  This model has: attention.{q,k,v,o} ×2, mlp.{gate,up,down} ×2, embed')):
        select(llama, "conv")
    with pytest.raises(Refused, match='no site for "expert.down"'):
        select(llama, ["linear", "expert.down"])
    assert select(llama, "conv", strict=False) == []


def test_default_role(llama):
    assert picked(llama, {"path": "layers.0.*"}, default="norm") == [f"model.layers.0.{x}_layernorm" for x in ("input", "post_attention")]


@pytest.mark.parametrize(
    "where, words",
    [
        ("lineer", 'passes[0].where: "lineer" is not a role. Did you mean "linear"'),
        ("attention.qq", 'Did you mean "attention.q"'),
        ("attention.{q,w}", '"attention.w" is not a role'),
        ("attention.{q", "brace without its partner"),
        ("attention.q}", "brace without its partner"),
        ("attention.{q,}", "empty choice"),
        ("", "empty role"),
        ([], "empty list"),
        (None, "expected a role, an object or a list of these, got null"),
        (7, "got 7"),
        ({}, 'none of "role", "path" and "depth"'),
        ({"role": "mlp", "depth": "1/2..1/4"}, 'where.depth: expected a part of the stack of blocks from 0 to 1, such as "0..1/4" or "1/4..1", got "1/2..1/4".'),
        ({"role": "mlp", "depth": "0..1/0"}, 'got "0..1/0"'),
        ({"role": "mlp", "depth": 3}, "got 3"),
        ({"rol": "linear"}, 'where.rol: no such key. Did you mean "role"?'),
        ({"role": 3}, "where.role: expected text, got 3"),
        ({"role": []}, "empty list"),
        ({"path": "layers.{3..0}.**"}, "runs backwards"),
        ({"path": ""}, "empty path"),
        ({"role": "linear", "expect": 0}, "where.expect: expected a whole number above 0, got 0"),
        ({"role": "linear", "expect": True}, "got true"),
        ({"role": "linear", "expect": "4"}, 'got "4"'),
        ({"role": "linear", "not": "lineer"}, "where.not:"),
        (["linear", {"role": "conf"}], "where[1].role:"),
    ],
)
def test_malformed(where, words):
    with pytest.raises(SpecError) as error:
        parse(where, "passes[0].where")
    assert words in str(error.value) and str(error.value).startswith("passes[0].where")


def test_every_role_has_a_name_that_parses():
    for role in ROLES:
        assert parse(role).roles == {role}
