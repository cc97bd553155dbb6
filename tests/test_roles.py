"""Roles are found by dataflow: expected paths are written by hand here, the engine knows none of them."""

import itertools
import random
import re
import time

import pytest
import torch
import transformers as T
from torch import nn
from torch.nn import functional as F

from rewrite.capture.model import capture
from rewrite.graph import Graph, shape
from rewrite.roles.find import Rows, roles
from rewrite.roles.where import ROLES, select
from tests.models import FAMILIES, build, captured


def spread(pattern):
    """`a.{b,c}.{0,1}` written out."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    return ["".join(each) for each in itertools.product(*([p] if i % 2 == 0 else p.split(",") for i, p in enumerate(parts)))]


def names(found, role):
    return sorted(site.name for site in found[role] if site.role == role)


def decoder(root, attention="self_attn.{}_proj", o="self_attn.o_proj", mlp="mlp.{}_proj", norms=("input_layernorm", "post_attention_layernorm"), final="model.norm", **more):
    layers = f"{root}.{{0,1}}."
    wanted = {f"attention.{x}": layers + attention.format(x) for x in "qkv"} | {f"mlp.{x}": layers + mlp.format(x) for x in ("gate", "up", "down")}
    return wanted | {"attention.o": layers + o, "norm": [layers + f"{{{','.join(norms)}}}", final], "embed": "model.embed_tokens", "head": "lm_head"} | more


def encoder(layers, q, k, v, o, up, down, **more):
    wanted = {"attention.q": q, "attention.k": k, "attention.v": v, "attention.o": o, "mlp.up": up, "mlp.down": down}
    return {role: f"{layers}.{{0,1}}.{path}" for role, path in wanted.items()} | more


BERT = lambda stem: encoder(  # noqa: E731
    f"{stem}.encoder.layer", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense",
    norm=[f"{stem}.embeddings.LayerNorm", f"{stem}.encoder.layer.{{0,1}}.{{attention.output,output}}.LayerNorm"],
    embed=f"{stem}.embeddings.word_embeddings",
)  # fmt: skip
TABLES = lambda stem: {"embed.position": f"{stem}.embeddings.position_embeddings", "embed.added": f"{stem}.embeddings.token_type_embeddings"}  # noqa: E731


def seq2seq(side, own="self_attn", cross="encoder_attn", norms=()):
    layers, decoders = "model.{encoder,decoder}.layers.{0,1}.", "model.decoder.layers.{0,1}."
    wanted = {f"attention.{x}": [f"{layers}{own}.{x}_proj", f"{decoders}{cross}.{x}_proj"] for x in "qkv"}
    wanted["attention.o"] = [f"{layers}{own}.out_proj", f"{decoders}{cross}.out_proj"]
    wanted["norm"] = [f"{layers}{{{own}_layer_norm,final_layer_norm}}", f"{decoders}{cross}_layer_norm", *norms]
    return wanted | {"mlp.up": layers + "fc1", "mlp.down": layers + "fc2", "attention.cross": decoders + cross} | side


CLIP = "{text,vision}_model.encoder.layers.{0,1}."
T5 = "{encoder,decoder}.block.{0,1}.layer."
EXPECTED = {
    "llama": decoder("model.layers"),
    "qwen3": decoder("model.layers", norms=("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")),
    "gemma3": decoder("model.layers", norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm")),
    "gpt2": {f"attention.{x}": f"transformer.h.{{0,1}}.attn.c_attn[{x}]" for x in "qkv"}
    | {"attention.qkv": "transformer.h.{0,1}.attn.c_attn", "attention.o": "transformer.h.{0,1}.attn.c_proj", "mlp.up": "transformer.h.{0,1}.mlp.c_fc", "mlp.down": "transformer.h.{0,1}.mlp.c_proj"}
    | {"norm": ["transformer.h.{0,1}.ln_{1,2}", "transformer.ln_f"], "embed": "transformer.wte", "embed.position": "transformer.wpe", "head": "lm_head"},
    "gpt_neox": {f"attention.{x}": f"gpt_neox.layers.{{0,1}}.attention.query_key_value[{x}]" for x in "qkv"}
    | {"attention.qkv": "gpt_neox.layers.{0,1}.attention.query_key_value", "attention.o": "gpt_neox.layers.{0,1}.attention.dense"}
    | {"mlp.up": "gpt_neox.layers.{0,1}.mlp.dense_h_to_4h", "mlp.down": "gpt_neox.layers.{0,1}.mlp.dense_4h_to_h"}
    | {"norm": ["gpt_neox.layers.{0,1}.{input,post_attention}_layernorm", "gpt_neox.final_layer_norm"], "embed": "gpt_neox.embed_in", "head": "lm_head"},
    "mixtral": {k: v for k, v in decoder("model.layers").items() if not k.startswith("mlp")}
    | {"router": "model.layers.{0,1}.mlp.gate", "expert.down": "model.layers.{0,1}.mlp.experts.down_proj", "expert.gate_up": "model.layers.{0,1}.mlp.experts.gate_up_proj"}
    | {f"expert.{x}": f"model.layers.{{0,1}}.mlp.experts.gate_up_proj[{x}]" for x in ("gate", "up")},
    "mamba": {"norm": ["backbone.layers.{0,1}.norm", "backbone.norm_f"], "embed": "backbone.embeddings", "head": "lm_head"},
    "bert": BERT("bert") | TABLES("bert") | {"head": "classifier", "head.hidden": "bert.pooler.dense"},
    "roberta": BERT("roberta") | TABLES("roberta") | {"head": "classifier.out_proj", "head.hidden": "classifier.dense"},
    "distilbert": encoder("distilbert.transformer.layer", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")
    | {"norm": ["distilbert.embeddings.LayerNorm", "distilbert.transformer.layer.{0,1}.{sa,output}_layer_norm"], "head": "classifier", "head.hidden": "pre_classifier"}
    | {"embed": "distilbert.embeddings.word_embeddings", "embed.position": "distilbert.embeddings.position_embeddings"},
    "deberta_v2": BERT("deberta")
    | {f"attention.{x[0]}": f"deberta.encoder.layer.{{0,1}}.attention.self.{x}_proj" for x in ("query", "key", "value")}
    | {"attention.position": "deberta.encoder.layer.{0,1}.attention.self.pos_{key,query}_proj", "embed.position": "deberta.embeddings.position_embeddings"}
    | {"head": "classifier", "head.hidden": "pooler.dense"},
    "t5": {f"attention.{x}": [f"{T5}0.SelfAttention.{x}", f"decoder.block.{{0,1}}.layer.1.EncDecAttention.{x}"] for x in "qkvo"}
    | {"mlp.up": ["encoder.block.{0,1}.layer.1.DenseReluDense.wi", "decoder.block.{0,1}.layer.2.DenseReluDense.wi"], "embed": "{encoder,decoder}.embed_tokens", "head": "lm_head"}
    | {"mlp.down": ["encoder.block.{0,1}.layer.1.DenseReluDense.wo", "decoder.block.{0,1}.layer.2.DenseReluDense.wo"], "attention.cross": "decoder.block.{0,1}.layer.1.EncDecAttention"}
    | {"norm": [T5 + "{0,1}.layer_norm", "decoder.block.{0,1}.layer.2.layer_norm", "{encoder,decoder}.final_layer_norm"]}
    | {"embed.relative": "{encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias"},
    "bart": seq2seq({"embed": "model.{encoder,decoder}.embed_tokens", "embed.position": "model.{encoder,decoder}.embed_positions", "head": "lm_head"}, norms=["model.{encoder,decoder}.layernorm_embedding"]),
    "whisper": seq2seq({"embed": "model.decoder.embed_tokens", "embed.position": "model.{encoder,decoder}.embed_positions", "head": "proj_out", "conv": "model.encoder.conv{1,2}"}, norms=["model.{encoder,decoder}.layer_norm"]),
    "vit": encoder("vit.layers", "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    | {"norm": ["vit.layers.{0,1}.layernorm_{before,after}", "vit.layernorm"], "embed.patch": "vit.embeddings.patch_embeddings.projection", "head": "classifier"},
    "clip": {f"attention.{x}": f"{CLIP}self_attn.{x}_proj" for x in ("q", "k", "v")}
    | {"attention.o": CLIP + "self_attn.out_proj", "mlp.up": CLIP + "mlp.fc1", "mlp.down": CLIP + "mlp.fc2", "embed": "text_model.embeddings.token_embedding", "head": "{text,visual}_projection"}
    | {"embed.position": "{text,vision}_model.embeddings.position_embedding", "embed.patch": "vision_model.embeddings.patch_embedding"}
    | {"norm": [CLIP + "layer_norm{1,2}", "text_model.final_layer_norm", "vision_model.p{re_layrnorm,ost_layernorm}"]},
}  # fmt: skip
REGIONS = {"attention", "attention.block", "mlp", "mixer", "residual", "block", "opaque", "logits", "model"}
RESIDUALS = {"t5": 10, "bart": 10, "whisper": 10, "clip": 8, "gpt_neox": 2, "mamba": 2}  # 4 elsewhere: two sub-layers in each of two blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_a_family_is_found(family):
    found = roles(captured(family))
    wanted = {role: sorted(sum(map(spread, [p] if isinstance(p, str) else p), [])) for role, p in EXPECTED[family].items()}
    got = {role: names(found, role) for role in {site.role for site in found} - REGIONS}
    assert got == wanted
    assert len(found["residual"]) == RESIDUALS.get(family, 4)
    assert len(found["block"]) == len(captured(family).blocks)
    assert set(found.names) <= set(ROLES)


@pytest.mark.parametrize("family", FAMILIES)
def test_handles_are_what_the_operation_reads(family):
    graph = captured(family)
    found = roles(graph)
    place = {node: i for i, node in enumerate(graph.nodes)}
    for site in found:
        assert all(node is None or node in place for node in site.handles.values())
        if site.role in ("block", "mlp", "attention.block", "mixer", "norm"):
            assert place[site.handles["x"]] < place[site.handles["y"]]
        if "linear" in site.roles and site.layout.kind == "linear":
            weight = shape(site.handles["w"])
            out_dim, in_dim = reversed(weight) if site.layout.transposed else weight
            assert shape(site.handles["y"])[-1] == out_dim and shape(site.handles["x"])[-1] == in_dim
    for site in found["residual"]:
        assert {site.handles["stream"], site.handles["branch"]} == set(site.node.args[:2])
    streams = [site.handles["y"] for site in found["residual"]]
    for before, site in zip(streams, found["residual"][1:]):
        if family in ("llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "mixtral", "vit", "mamba"):  # norm before: the stream is the sum itself
            assert before in _behind(site.handles["stream"])


def _behind(node):
    while node.op == "call_function" and "to" in str(node.target) and node.all_input_nodes:
        yield node
        node = node.all_input_nodes[0]
    yield node


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "bert", "t5", "vit"])
def test_parts_of_an_attention_are_its_own(family):
    """q, k and v of one site must be those of one attention: swapping k and v would change the model, so they must differ."""
    found = roles(captured(family))
    for part in "qkv":
        sites = found[f"attention.{part}"]
        assert len(sites) == len(found["attention"])
        assert len({(site.path, site.layout.rows) for site in sites}) == len(sites)


def test_fused_rows():
    assert [str(site.layout) for site in roles(captured("gpt2"))["attention.k"]] == ["linear in×out rows 24:48"] * 2
    rows = {part: roles(captured("gpt_neox"))[f"attention.{part}"][0].layout.rows for part in "qkv"}
    assert {part: (r.start, r.stop, r.period) for part, r in rows.items()} == {"q": (0, 6, 18), "k": (6, 12, 18), "v": (12, 18, 18)}
    assert sorted(torch.cat([r.index() for r in rows.values()]).tolist()) == list(range(72))


def test_rows_of_a_model_are_the_values_that_arrive():
    """The rows named q really make q: setting the weight's other rows to zero leaves q as it was."""
    model = build("gpt_neox")
    weight = model.gpt_neox.layers[0].attention.query_key_value
    site = roles(captured("gpt_neox"))["attention.q"][0]
    x = torch.randn(2, 5, 24)
    q = weight(x).view(2, 5, 4, 18)[..., :6]
    assert torch.equal(weight(x)[..., site.layout.rows.index()].view(2, 5, 4, 6), q)
    assert not torch.equal(weight(x)[..., :24].view(2, 5, 4, 6), q)


def test_rows_are_regular_or_listed():
    assert Rows.of(torch.arange(8), 8) is None
    assert Rows.of(torch.arange(2, 5), 8) == Rows(2, 5, 8, 8)
    assert Rows.of(torch.tensor([1, 4, 7]), 9) == Rows(1, 2, 3, 9)
    odd = Rows.of(torch.tensor([0, 1, 5]), 9)
    assert odd.listed == (0, 1, 5) and len(odd) == 3 and not odd.is_slice


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_names_of_modules_do_not_matter(family):
    """The same model with every submodule renamed at random has the same sites, under the new names."""
    model = build(family)
    rename = _scramble(model)
    graph = captured(family)
    before = [(site.role, rename(site.path), str(site.layout)) for site in roles(graph) if site.role not in REGIONS]
    assert [(site.role, site.path, str(site.layout)) for site in roles(_renamed(graph, rename)) if site.role not in REGIONS] == before


def _scramble(model):
    """A function from the paths of a model to paths of meaningless names."""
    pick = random.Random(0)
    words = {}
    for path, _ in [*model.named_modules(), *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        for word in path.split("."):
            if not word.isdigit():
                words.setdefault(word, f"n{pick.randrange(10**9)}")
    return lambda path: ".".join(words.get(word, word) for word in path.split("."))


def _renamed(graph, rename):
    """The same graph over a tree whose modules and tensors have other names."""
    copy, env = torch.fx.Graph(), {}
    for node in graph.nodes:
        new = env[node] = copy.node_copy(node, lambda n: env[n])
        new.meta = dict(node.meta, path=rename(node.meta.get("path") or ""))
        if node.op in ("get_attr", "call_module"):
            new.target = rename(node.target)
    memo = {}

    def tree(module):
        if id(module) not in memo:
            twin = memo[id(module)] = nn.Module()
            for kind in ("_parameters", "_buffers", "_modules"):
                values = getattr(module, kind).items()
                getattr(twin, kind).update((rename(name), tree(value) if kind == "_modules" and value is not None else value) for name, value in values)
        return memo[id(module)]

    blocks = tuple(rename(block) for block in graph.blocks)
    return Graph(copy, tree(graph.root), graph.name, graph.owner, graph.inputs, graph.outputs, blocks, signature=graph.signature)


PEFT = {"llama": "llama", "qwen3": "qwen3", "gemma3": "gemma3_text", "gpt2": "gpt2", "gpt_neox": "gpt_neox", "mixtral": "mixtral", "bert": "bert", "roberta": "roberta",
        "deberta_v2": "deberta-v2", "t5": "t5", "bart": "bart"}  # fmt: skip


@pytest.mark.parametrize("family", PEFT)
def test_agrees_with_peft(family):
    """Where PEFT has a hand-kept list of LoRA targets, it names the modules that hold q and v (k beside them where the weight is fused)."""
    constants = pytest.importorskip("peft.utils.constants")
    targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[PEFT[family]]
    theirs = {path for path, module in build(family).named_modules() if path.rpartition(".")[2] in targets}
    found = roles(captured(family))
    assert {site.path for part in "qv" for site in found[f"attention.{part}"]} == theirs


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit", "roberta", "mixtral"])
def test_linear_is_all_linear_of_peft(family):
    """`linear` is PEFT's all-linear: every linear but the head. RoBERTa's dense layer before the head is ours and not theirs (they leave out all of `classifier`)."""
    kinds = (nn.Linear, T.pytorch_utils.Conv1D)
    model = build(family)
    theirs = {path for path, module in model.named_modules() if isinstance(module, kinds) and not path.startswith(("lm_head", "classifier"))}
    ours = {site.owner for site in roles(captured(family))["linear"]}
    beside = {"roberta": {"classifier.dense"}, "mixtral": {f"model.layers.{i}.mlp.experts" for i in (0, 1)}}  # experts are no nn.Linear
    assert ours == theirs | beside.get(family, set())


@pytest.mark.parametrize("family", FAMILIES)
def test_variants_agree(family):
    """The graphs that generate call the same weights by the same roles as the main one."""
    main = captured(family)
    wanted = {}
    for site in roles(main):
        if site.operation is not None and site.role not in REGIONS | {"attention.cross"}:
            wanted.setdefault((site.name, site.layout.rows), set()).add(site.roles)
    for variant in main.variants.values():
        for site in () if variant.is_inner else roles(variant):
            if site.operation is not None and site.role not in REGIONS | {"attention.cross"}:
                assert site.roles in wanted[site.name, site.layout.rows], (variant.name, site)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(10, 24), nn.Linear(24, 20), nn.Linear(20, 7)

    def forward(self, x):
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


def test_an_mlp_has_no_attention():
    found = roles(capture(Mlp(), {"x": torch.randn(3, 10)}))
    assert [(site.role, site.path) for site in found if site.role not in REGIONS] == [("linear", "first"), ("linear", "second"), ("head", "third")]
    assert not found["attention"] and not found["residual"]


class Products(nn.Module):
    """Products of activations are no sites; nor is a softmax that no product follows an attention."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(24, 10), nn.Linear(24, 10), nn.Linear(7, 5)

    def forward(self, x):
        similar = self.a(x) @ self.b(x).transpose(-1, -2)
        return self.out(torch.softmax(similar, -1).sum(1))


def test_a_product_of_activations_is_no_site():
    found = roles(capture(Products(), {"x": torch.randn(3, 7, 24)}))
    assert [(site.role, site.path) for site in found if site.role not in REGIONS] == [("linear", "a"), ("linear", "b"), ("head", "out")]


class Written(nn.Module):
    """Attention in plain matmuls, with everything that may stand between: scale, bias, mask, dropout, norms per head."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.zeta, self.alpha, self.beta, self.gamma = (nn.Linear(24, 24) for _ in range(4))
        self.ln, self.head = nn.LayerNorm(24), nn.Linear(24, 7)
        self.bias = nn.Parameter(torch.randn(4, 9, 9))

    def forward(self, x, keep):
        h = self.ln(x)
        q, k, v = (f(h).unflatten(-1, (4, 6)).transpose(1, 2) for f in (self.zeta, self.alpha, self.beta))
        if self.form == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 6**0.5
        elif self.form == "baddbmm":
            scores = torch.baddbmm(self.bias.repeat(x.shape[0], 1, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=0.4).unflatten(0, (-1, 4))
        elif self.form == "norms":
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 3 + self.bias
        else:
            scores = (q * 6**-0.5) @ k.mT
        scores = scores.masked_fill(~keep[:, None, None, :], -1e9).float()
        p = F.dropout(torch.softmax(scores, -1).to(q.dtype), 0.1, self.training)
        y = torch.einsum("bhqk,bhkd->bhqd", p, v) if self.form == "einsum" else p @ v
        return self.head(x + self.gamma(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("form", ["matmul", "einsum", "baddbmm", "norms"])
def test_attention_written_out(form):
    example = {"x": torch.randn(3, 9, 24), "keep": torch.ones(3, 9, dtype=torch.bool)}
    found = roles(capture(Written(form).eval(), example))
    got = {site.role: site.path for site in found if site.role not in REGIONS}
    assert got == {"norm": "ln", "attention.q": "zeta", "attention.k": "alpha", "attention.v": "beta", "attention.o": "gamma", "head": "head"}
    assert found["attention"][0].handles["mask"] is not None
    assert found["attention.block"][0].handles["x"].target is torch.ops.aten.layer_norm.default


def test_multihead_attention_of_torch():
    layer = nn.TransformerDecoderLayer(24, 4, 56, batch_first=True).eval()
    found = roles(capture(layer, {"tgt": torch.randn(2, 7, 24), "memory": torch.randn(2, 5, 24)}))
    assert [(s.label, str(s.layout.rows), s.layout.stored) for s in found["attention.k"]] == [
        ("in_proj_weight.k", "rows 24:48", None),
        ("in_proj_weight.k", "rows 0:24", Rows(24, 72, 72, 72)),
    ]
    assert [site.path for site in found["attention.cross"]] == ["multihead_attn"]
    assert [site.path for site in found["attention.o"]] == ["self_attn.out_proj", "multihead_attn.out_proj"]


def test_block_and_region_handles():
    found = roles(captured("bert"))
    first, second = found["block"]
    assert second.handles["x"] is first.handles["y"] and (first.index, second.index) == (0, 1)
    mlp = found["mlp"][0]
    assert mlp.handles["x"].target is torch.ops.aten.layer_norm.default and mlp.handles["y"] in found["residual"][1].handles.values()


def test_summary_and_table():
    found = roles(captured("llama"))
    assert found.summary().startswith("attention.{q,k,v,o} ×2, mlp.{gate,up,down} ×2, embed, norm ×5, head, ")
    import rich.console

    console = rich.console.Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(found.table())
    assert "model.layers.{0..1}.mlp.down_proj" in console.export_text()


def test_sites_that_differ_by_their_block_alone_are_one_line():
    lines = str(roles(captured("gemma3"))).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("mlp.up ")] == ["model.layers.{0..1}.mlp.up_proj"]
    residuals = [line.split()[1] for line in str(roles(captured("whisper"))).splitlines() if line.startswith("residual") and "decoder" in line]
    assert residuals == [f"model.decoder.layers.{{0..1}}[{number}]" for number in range(3)]
    (q,) = (line for line in str(roles(captured("clip"))).splitlines() if "text_model" in line and line.startswith("attention.q"))
    found = select(roles(captured("clip")), {"path": q.split()[1], "expect": 2})  # the name is a path that `where` takes
    assert {site.role for site in found} == {"attention.q"}


class Deep(nn.Module):
    """Attention and an MLP, norms before: the blocks of a decoder, as many as asked for."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.LayerNorm(24), nn.LayerNorm(24)
            self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
            self.gate, self.up, self.down = nn.Linear(24, 56), nn.Linear(24, 56), nn.Linear(56, 24)

        def forward(self, x):
            h = self.one(x)
            q, k, v = (f(h).unflatten(-1, (4, 6)).transpose(1, 2) for f in (self.q, self.k, self.v))
            turned = [t * 0.5 + torch.cat((-t[..., 3:], t[..., :3]), -1) * 0.3 for t in (q, k)]
            x = x + self.o(F.scaled_dot_product_attention(*turned, v, is_causal=True).transpose(1, 2).flatten(2))
            h = self.two(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(self.Block() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_linear_in_depth():
    """Four times the layers take about four times as long: 32 layers stay well under half a second."""
    times = {}
    for layers in (4, 16):
        graph = capture(Deep(layers).eval(), {"x": torch.randn(2, 5, 24)})
        assert len(roles(graph)["linear"]) == 7 * layers
        times[layers] = min(_seconds(graph) for _ in range(3))
    assert times[16] < 0.25 and times[16] < 8 * times[4], times


def _seconds(graph):
    start = time.process_time()
    roles(graph)
    return time.process_time() - start
