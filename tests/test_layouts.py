"""Every layout of a transformer in use, one small model each: its roles, adapters on them, and what a sweep over all architectures showed to be hard."""

import copy
import functools
from fractions import Fraction

import pytest
import torch
import transformers as T
from checks import close, rejects, rounding
from models import GROUPED, SIZES, SPECIAL
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rewrite import capture, rewrite
from rewrite.calls.inputs import Examples
from rewrite.calls.signature import variants
from rewrite.emit.live import make_live
from rewrite.pipeline import apply, live_of
from rewrite.roles.find import Roles, everywhere, roles
from rewrite.roles.where import ROLES, select
from rewrite.spec.parse import Spec


class Looped(nn.Module):
    """Cannot be traced, and has a norm without parameters inside."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x):
        while x.abs().max() > 3:
            x = self.norm(self.inner(x))
        return x


def test_a_leaf_without_parameters_inside_an_opaque_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Looped(), nn.Linear(8, 5)).eval()
    graph = capture(model, (torch.randn(3, 8) * 9,))
    assert list(graph.opaque) == ["1"]


class Recurrent(nn.Module):
    """A mixer in a loop over time, which stays one call; with `attends` it weighs what it has kept, as an attention does."""

    def __init__(self, attends):
        super().__init__()
        self.attends, self.zeta, self.beta, self.alpha = attends, nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 8)

    def forward(self, x):
        h, kept, state = self.zeta(x), [], 0
        for t in range(h.shape[1]):
            state = state / 2 + torch.tanh(self.beta(h[:, t]))
            kept.append(state)
        kept = torch.stack(kept, 1)
        return self.alpha(kept.softmax(1) * kept if self.attends else kept)


class Layer(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(8), mixer

    def forward(self, x):
        return x + self.mixer(self.norm(x))


@pytest.mark.parametrize("attends", [False, True])
def test_leaves_of_a_mixer_that_stays_one_call(attends):
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(Recurrent(attends)) for _ in range(2)), nn.Linear(8, 5)).eval()
    graph = capture(model, (torch.randn(3, 6, 8),))
    assert set(graph.opaque) == {"0.mixer", "1.mixer"}
    parts = ("mixer.in", "mixer.inner", "mixer.out") if not attends else ("linear",) * 3
    leaves = [f"{i}.mixer.{name}" for i in (0, 1) for name in ("zeta", "beta", "alpha")]
    assert {site.path: site.role for site in everywhere(graph) if ".mixer." in site.path} == dict(zip(leaves, parts * 2))
    assert {site.depth for site in everywhere(graph)["linear"]} == {Fraction(1, 4), Fraction(3, 4)}


class Counted(nn.Module):
    """Takes as many vectors as the mask has ones; the code checks that there is one kind of row."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 5)

    def forward(self, x, mask):
        torch._check(torch.unique_consecutive(mask.sum(1)).numel() == 1, lambda: "rows of several kinds")
        return self.out(x[mask, :].view(x.shape[0], -1, 8)[:, -1])


def test_a_check_of_a_size_that_depends_on_values_is_asked_at_every_call():
    torch.manual_seed(0)
    model = Counted().eval()
    mask = torch.tensor([[True, False, True, False], [True, True, False, False], [False, True, True, False]])
    graph = capture(model, {"x": torch.randn(3, 4, 8), "mask": mask})
    assert torch.ops.aten._assert_scalar.default in {node.target for node in graph.nodes} and not graph.checks
    live, x = make_live(graph), torch.randn(2, 4, 8)
    assert torch.equal(live(x, mask[:2]), model(x, mask[:2]))
    uneven = torch.tensor([[True, True, True, False], [True, False, False, False]])
    for broken in (model, live):
        with pytest.raises((ValueError, RuntimeError)):
            broken(x, uneven)


def test_a_classifier_over_an_encoder_decoder_makes_its_decoders_inputs():
    sizes = dict(d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40)
    model = T.BartForSequenceClassification(T.BartConfig(vocab_size=99, max_position_embeddings=64, **sizes, **SPECIAL, decoder_start_token_id=1)).eval()
    (main,) = variants(model)
    assert set(main.kwargs) >= {"input_ids", "attention_mask"} and "decoder_input_ids" not in main.kwargs and main.shifts is None


@pytest.fixture(scope="module")
def seeing():
    """A vision-language model: the tokens of an image stand in the ids, and the image's vectors take their places."""
    vision = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40, image_size=16, patch_size=8)
    text = T.LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, **SPECIAL)
    torch.manual_seed(0)
    return T.LlavaForConditionalGeneration(T.LlavaConfig(vision_config=T.CLIPVisionConfig(**vision), text_config=text, image_token_index=98, vision_feature_layer=-1)).eval()


def test_images_take_the_places_of_their_tokens(seeing):
    """The model lists its images one by one, so their number stays that of the example; all else is captured."""
    ids = torch.tensor([[1, 98, 98, 98, 98, 7, 8], [1, 5, 98, 98, 98, 98, 9]])
    pixels = torch.randn(2, 3, 16, 16)
    live = rewrite(seeing, {"passes": [{"pass": "lora", "where": "attention.{q,v}", "rank": 2}]}, {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)})
    assert not live.report.opaque and any("batch" in note and "2" in note for note in live.report.notes)
    asked = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        assert torch.equal(live(**asked).logits, seeing.requires_grad_(False)(**asked).logits)
        assert not torch.equal(live(**{**asked, "pixel_values": pixels * 2}).logits, live(**asked).logits)


def bloom(**more):
    return T.BloomForCausalLM(T.BloomConfig(vocab_size=99, hidden_size=24, n_layer=1, n_head=4, **SPECIAL, **more))


ONE = {**SIZES, "num_hidden_layers": 1}
PAIR = dict(num_key_value_heads=2)
GPT = dict(vocab_size=99, n_embd=24, n_layer=1, n_head=4, n_inner=56, n_positions=64, **SPECIAL)
FALCON = dict(vocab_size=99, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, ffn_hidden_size=56, **SPECIAL)
LATENT = dict(q_lora_rank=12, kv_lora_rank=14, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
ROUTED = dict(first_k_dense_replace=0, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=20)
STAGES = dict(num_channels=3, attention_drop_rate=[0.0] * 3, drop_rate=[0.0] * 3, drop_path_rate=[0.0] * 3, mlp_ratio=[2.0] * 3, num_labels=3)
PLAIN = "attention.{q,k,v,o}, mlp.{up,down}"
GATED = "attention.{q,k,v,o}, mlp.{gate,up,down}"
FUSED = "attention.{q,k,v,o,qkv}, mlp.{up,down}"
CHOSEN = "attention.{q,k,v,o}, router, expert.{gate,up,down,gate_up}"
LATENTS = "attention.q.{up,down}, attention.kv.{up,down}, attention.{k,v,o,fused}, attention.k.rope, router, expert.{gate,up,down,gate_up}, expert.shared.{gate,up,down}"
BOTH = "attention.{q,k,v,o} ×3, mlp.{up,down} ×2"
# name: (model, its roles without embeddings, norms, heads and regions)
LAYOUTS = {
    "gpt2": (lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT)), FUSED),
    "gpt_neox": (lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**ONE, **SPECIAL)), FUSED),
    "falcon": (lambda: T.FalconForCausalLM(T.FalconConfig(**FALCON, multi_query=True)), FUSED),
    "falcon_grouped": (lambda: T.FalconForCausalLM(T.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True)), FUSED),
    "phi3": (lambda: T.Phi3ForCausalLM(T.Phi3Config(**ONE, **PAIR, **SPECIAL)), "attention.{q,k,v,o,qkv}, mlp.{gate,up,down,gate_up}"),
    "bloom": (bloom, FUSED),
    "gpt_bigcode": (lambda: T.GPTBigCodeForCausalLM(T.GPTBigCodeConfig(**GPT)), FUSED),
    "codegen": (lambda: T.CodeGenForCausalLM(T.CodeGenConfig(**{**GPT, "n_embd": 32}, rotary_dim=4)), FUSED),
    "mpt": (lambda: T.MptForCausalLM(T.MptConfig(d_model=24, n_heads=4, n_layers=1, expansion_ratio=2, max_seq_len=64, vocab_size=99, **SPECIAL)), FUSED),
    "t5": (lambda: T.T5ForConditionalGeneration(T.T5Config(vocab_size=99, d_model=24, d_kv=10, d_ff=56, num_layers=1, num_heads=4, **SPECIAL, decoder_start_token_id=0)), BOTH),
    "deberta": (lambda: T.DebertaForMaskedLM(T.DebertaConfig(**ONE, max_position_embeddings=64, pad_token_id=0)), FUSED),
    "swin": (lambda: T.SwinForImageClassification(T.SwinConfig(image_size=8, patch_size=2, embed_dim=12, depths=[2], num_heads=[2], window_size=2, drop_path_rate=0.3, num_labels=3)),
             "attention.{q,k,v,o} ×2, mlp.{up,down} ×2"),
    "clip": (lambda: T.CLIPTextModelWithProjection(T.CLIPTextConfig(**ONE, eos_token_id=98, bos_token_id=97, max_position_embeddings=64, attn_implementation="eager")), PLAIN),
    "cvt": (lambda: T.CvtForImageClassification(T.CvtConfig(embed_dim=[12] * 3, depth=[1, 2, 3], num_heads=[2] * 3, **STAGES)), "attention.{q,k,v,o} ×6, attention.conv ×18, mlp.{up,down} ×6, conv ×3"),
    "convbert": (lambda: T.ConvBertForMaskedLM(T.ConvBertConfig(**ONE, embedding_size=24, max_position_embeddings=64, conv_kernel_size=3, pad_token_id=0)),
                 PLAIN + ", mixer.{in,conv}, mixer.inner ×2"),
    "gemma2": (lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**ONE, **GROUPED, sliding_window=4, **SPECIAL)), GATED),
    "olmo2": (lambda: T.Olmo2ForCausalLM(T.Olmo2Config(**ONE, **PAIR, **SPECIAL)), GATED),
    "apertus": (lambda: T.ApertusForCausalLM(T.ApertusConfig(**ONE, **PAIR, **SPECIAL)), PLAIN),
    "phi": (lambda: T.PhiForCausalLM(T.PhiConfig(**{**ONE, "hidden_size": 32}, **SPECIAL)), PLAIN),
    "gptj": (lambda: T.GPTJForCausalLM(T.GPTJConfig(**GPT, rotary_dim=4)), PLAIN),
    "cohere": (lambda: T.CohereForCausalLM(T.CohereConfig(**ONE, **PAIR, **SPECIAL)), GATED),
    "opt": (lambda: T.OPTForCausalLM(T.OPTConfig(**{**FALCON, "ffn_dim": 56}, max_position_embeddings=64, word_embed_proj_dim=20)), PLAIN + ", linear"),
    "albert": (lambda: T.AlbertForMaskedLM(T.AlbertConfig(**SIZES, embedding_size=20, max_position_embeddings=64, pad_token_id=0)), "attention.{q,k,v,o} ×2, mlp.{up,down} ×2, linear"),
    "mobilebert": (lambda: T.MobileBertForMaskedLM(T.MobileBertConfig(**ONE, embedding_size=20, true_hidden_size=16, intra_bottleneck_size=16, num_feedforward_networks=1, max_position_embeddings=64,
                                                                      pad_token_id=0)), "attention.{q,k,v,o}, mlp.{up,down}, linear ×5"),
    "deepseek_v2": (lambda: T.DeepseekV2ForCausalLM(T.DeepseekV2Config(**ONE, **LATENT, **ROUTED, **SPECIAL)), LATENTS),
    "deepseek_v3": (lambda: T.DeepseekV3ForCausalLM(T.DeepseekV3Config(**ONE, **LATENT, **ROUTED, **SPECIAL)), LATENTS),
    "qwen2_moe": (lambda: T.Qwen2MoeForCausalLM(T.Qwen2MoeConfig(**ONE, **PAIR, **EXPERTS, shared_expert_intermediate_size=28, **SPECIAL)),
                  "attention.{q,k,v,o}, router, router.shared, expert.{gate,up,down,gate_up}, expert.shared.{gate,up,down}"),
    "qwen3_moe": (lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**ONE, **GROUPED, **EXPERTS, **SPECIAL)), CHOSEN),
    "gpt_oss": (lambda: T.GptOssForCausalLM(T.GptOssConfig(**ONE, **GROUPED, **LOCAL, **SPECIAL)), CHOSEN),
    "granitemoe_shared": (lambda: T.GraniteMoeSharedForCausalLM(T.GraniteMoeSharedConfig(**ONE, **PAIR, **LOCAL, shared_intermediate_size=20, **SPECIAL)),
                          "attention.{q,k,v,o}, mlp.gate_up, router, expert.{gate,up,down,gate_up}, expert.shared.{gate,up,down}"),
    "llama4": (lambda: T.Llama4ForCausalLM(T.Llama4TextConfig(**ONE, **GROUPED, num_local_experts=4, interleave_moe_layer_step=1, no_rope_layers=[1], attention_chunk_size=8, **SPECIAL)),
               "attention.{q,k,v,o}, router, expert.{gate,up,down,gate_up}, expert.shared.{gate,up,down}"),
    "lfm2": (lambda: T.Lfm2ForCausalLM(T.Lfm2Config(**ONE, **PAIR, layer_types=["conv"], **SPECIAL)), "mlp.{gate,up,down}, mixer.{in,conv,out}"),
    "mamba2": (lambda: T.Mamba2ForCausalLM(T.Mamba2Config(vocab_size=99, hidden_size=24, num_hidden_layers=1, state_size=7, num_heads=4, head_dim=12, n_groups=1, chunk_size=8, **SPECIAL)),
               "mixer.{in,conv,out}"),
    "recurrent_gemma": (lambda: T.RecurrentGemmaForCausalLM(T.RecurrentGemmaConfig(**ONE, num_key_value_heads=1, lru_width=24, block_types=["recurrent"], **SPECIAL)),
                        "mlp.{gate,up,down}, mixer.in ×2, mixer.{conv,out}"),
}  # fmt: skip
# the rows of the parts of a fused projection: first, last, period
ROWS = {
    "gpt2": {"q": (0, 24, 72), "k": (24, 48, 72), "v": (48, 72, 72)},
    "gpt_neox": {"q": (0, 6, 18), "k": (6, 12, 18), "v": (12, 18, 18)},
    "phi3": {"q": (0, 24, 48), "k": (24, 36, 48), "v": (36, 48, 48), "gate": (0, 56, 112), "up": (56, 112, 112)},
    "falcon": {"q": (0, 24, 36), "k": (24, 30, 36), "v": (30, 36, 36)},
    "falcon_grouped": {"q": (0, 12, 24), "k": (12, 18, 24), "v": (18, 24, 24)},
    "bloom": {"q": (0, 6, 18), "k": (6, 12, 18), "v": (12, 18, 18)},
    "gpt_bigcode": {"q": (0, 24, 36), "k": (24, 30, 36), "v": (30, 36, 36)},
    "codegen": {"q": (0, 8, 24), "v": (8, 16, 24), "k": (16, 24, 24)},
    "mpt": {"q": (0, 24, 72), "k": (24, 48, 72), "v": (48, 72, 72)},
    "deberta": {"q": (0, 6, 18), "k": (6, 12, 18), "v": (12, 18, 18)},
}


def weights(found):
    """The summary of the projections alone."""
    aside = ("embed", "norm", "head")
    return Roles(site for site in found if site.layout.kind and site.role.partition(".")[0] not in aside).summary()


@functools.cache
def laid(layout):
    """A model, its graph and roles."""
    torch.manual_seed(0)
    model = LAYOUTS[layout][0]().eval().requires_grad_(False)
    graph = capture(model, generation=False)
    return model, graph, roles(graph)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_roles_of_a_layout(layout):
    found = laid(layout)[2]
    assert weights(found) == LAYOUTS[layout][1] and set(found.names) <= set(ROLES)
    for part, rows in ROWS.get(layout, {}).items():
        (site,) = found[f"attention.{part}" if part in "qkv" else f"mlp.{part}"]
        assert site.label == part and (site.layout.rows.start, site.layout.rows.stop, site.layout.rows.period) == rows
    if layout in ROWS:
        (whole,) = found["attention.qkv"]
        assert "linear" not in whole.roles and whole.path == found["attention.q"][0].path


def adapted(layout, where):
    """The live model with low-rank adapters at a where."""
    graph = laid(layout)[1].copy()
    spec = Spec.parse({"passes": [{"pass": "lora", "where": where, "rank": 2}]})
    return live_of(graph, spec, apply(graph, spec), None).eval()


def outputs(live, inputs):
    """All numbers that a call gives, as one vector."""
    fields = live(**inputs, **({"use_cache": False} if getattr(live.config, "use_cache", False) else {})).to_tuple()
    return torch.cat([value.flatten() for value in fields if isinstance(value, torch.Tensor) and value.is_floating_point()])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_on_a_layout(layout):
    """Nothing changes at the start, every new tensor moves the output, and each gets a gradient of its own."""
    model, _, found = laid(layout)
    where = "attention.{q,v}" if layout in ROWS else "linear"
    live = adapted(layout, where)
    inputs, _ = next(Examples(model).candidates())
    assert torch.equal(outputs(live, inputs), outputs(model, inputs))
    new = {name: p for name, p in live.named_parameters() if p.requires_grad}
    assert {name.split(".lora.")[0] for name in new} == {site.owner for site in select(found, where)}
    generator = torch.Generator().manual_seed(0)
    for p in new.values():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    moved = outputs(live, inputs)
    assert not torch.equal(moved, outputs(model, inputs))
    moved.square().mean().backward()
    assert not [name for name, p in new.items() if p.grad is None or not p.grad.any()]


def test_parts_of_a_latent_attention():
    """The keys that pass by the latent are rows of what makes it; one product makes the other keys, and the values, from it."""
    _, _, found = laid("deepseek_v3")
    rope, up = found["attention.k"]
    assert (rope.role, str(rope.layout.rows), up.role, str(up.layout.rows)) == ("attention.k.rope", "rows 14:18", "attention.k", "rows 0:6 of every 14")
    assert [(site.path.rpartition(".")[2], str(site.layout.rows or "all")) for part in ("q.down", "q.up", "kv.down", "kv.up") for site in found[f"attention.{part}"]] == [
        ("q_a_proj", "all"), ("q_b_proj", "all"), ("kv_a_proj_with_mqa", "rows 0:14"), ("kv_b_proj", "all")]  # fmt: skip
    assert found["attention.q"] == found["attention.q.up"]


def test_an_expert_for_every_token_is_an_mlp_too():
    for layout in ("deepseek_v3", "qwen2_moe", "granitemoe_shared", "llama4"):
        found = laid(layout)[2]
        assert found["mlp.down"] == found["expert.shared.down"] and "shared" in found["mlp.down"][0].path
    assert str(laid("gpt_oss")[2]["expert.up"][0].layout) == "experts in×out rows 1:2 of every 2"
    assert "linear" not in laid("qwen2_moe")[2]["router.shared"][0].roles


def test_a_block_used_twice_has_a_site_for_each_call():
    found = laid("albert")[2]
    assert len({site.path for site in found["attention.q"]}) == 1 and len({site.node for site in found["attention.q"]}) == 2


@pytest.mark.parametrize(("layout", "path"), [("t5", "SelfAttention.relative_attention_bias"), ("swin", "attention.relative_position_bias")])
def test_tables_of_relative_positions(layout, path):
    found = laid(layout)[2]
    assert len(found["embed.relative"]) == 2 and all(site.path.endswith(path) for site in found["embed.relative"]) and not found["embed.position"]


def test_positions_that_are_shifted_are_positions():
    assert [site.path for site in laid("opt")[2]["embed.position"]] == ["model.decoder.embed_positions"]


def test_slices_of_an_interleaved_weight_are_those_of_a_formula():
    """GPT-NeoX stores q, k and v head by head: what adapters on q and v do is what the same sums do in the stored weight, in float64."""
    model, _, found = laid("gpt_neox")
    live = adapted("gpt_neox", "attention.{q,v}").double()
    inputs, _ = next(Examples(model).candidates())
    generator = torch.Generator().manual_seed(1)
    added = {}
    for name, p in live.named_parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            added[tuple(name.split(".")[-2:])] = p.detach()
    merged = copy.deepcopy(model).double()
    heads = merged.gpt_neox.layers[0].attention.query_key_value.weight.view(4, 3, 6, 24)  # head, q k v, its rows, in
    for place, part in ((0, "q"), (2, "v")):
        heads[:, place] += 16 / 2 * (added[part, "up"] @ added[part, "down"]).view(4, 6, 24)
    close(reference=outputs(merged, inputs), result=outputs(live, inputs), drift=1e-12)
    heads[:, [0, 2]] = heads[:, [2, 0]]
    rejects(reference=outputs(merged, inputs), result=outputs(live, inputs), drift=1e-12)


@functools.cache
def many_experts():
    """The graph of a decoder in bfloat16 with 64 experts, of whom each token takes two."""
    torch.manual_seed(0)
    sizes = {**ONE, "hidden_size": 32} | dict(num_experts=64, num_experts_per_tok=2, moe_intermediate_size=48, head_dim=8)
    model = T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**sizes, **PAIR, **SPECIAL)).to(torch.bfloat16)
    return capture(model.eval().requires_grad_(False), generation=False)


def on_experts(rank):
    graph, spec = many_experts().copy(), Spec.parse({"passes": [{"pass": "lora", "where": "expert.{gate,up,down}", "rank": rank}]})
    return live_of(graph, spec, apply(graph, spec), None).eval()


class Watched(TorchDispatchMode):
    """The largest tensor that an op makes, and how many sums its products with tensors of a pass take."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.largest, self.sums = {w.untyped_storage().data_ptr() for w in weights}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor)]
        makes = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in {a.untyped_storage().data_ptr() for a in given}
        if makes:
            self.largest = max(self.largest, out.numel())
        if "mm" in str(func) and any(a.untyped_storage().data_ptr() in self.weights for a in given):
            self.sums += out.numel() * given[0].shape[-1]
        return out


def test_only_the_experts_of_a_token_work():
    """A token runs through the low ranks of its two experts, and no expert's difference is ever written out."""
    live = on_experts(8)
    watched, ids = Watched(p for p in live.parameters() if p.requires_grad), torch.arange(3, 13)[None]
    with torch.no_grad(), watched:
        live(ids, use_cache=False)
    rows, widths = 10 * 2, (32 + 48) + (32 + 48) + (48 + 32)
    assert watched.sums == rows * 8 * widths
    few = 64 * 48 * 32 / 8  # all differences of one weight would be eight times that
    assert watched.largest < few
    own = dict(live.named_parameters())
    with torch.no_grad(), watched:
        next(p for name, p in own.items() if name.endswith("gate.up")) @ next(p for name, p in own.items() if name.endswith("gate.down"))
    assert watched.largest > few


def test_a_rank_of_any_size_in_bfloat16():
    """A grouped product wants rows of whole 16 bytes: a rank of 3 gets zeros behind, and does what one of 8 with zeros does."""
    three, eight = on_experts(3), on_experts(8)
    ids, generator, wide = torch.arange(3, 13)[None], torch.Generator().manual_seed(0), dict(eight.named_parameters())
    for name, p in three.named_parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            into = wide[name].data.zero_()[tuple(slice(size) for size in p.shape)]
            into.copy_(p.data * 8 / 3 if name.endswith(".down") else p.data)  # alpha / rank
    reference, result = (live(ids, use_cache=False).logits for live in (eight, three))
    close(reference=reference, result=result, drift=rounding(torch.bfloat16))
    rejects(reference=make_live(many_experts().copy())(ids, use_cache=False).logits, result=result, drift=rounding(torch.bfloat16))
    result.float().square().mean().backward()
    assert not [name for name, p in three.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
