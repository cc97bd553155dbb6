"""A site's own body run again, values threaded from site to site, parts without gradients, and the bytes that wait for backward.

The formulas are written anew, in float64, on the tensors of the live model; each check has a twin that it must reject.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers as T
from checks import TOYS, WrittenBlock, captured, close, model_of, rejects, rounding, tensor_of, wake
from torch import fx, nn
from torch.nn import functional as F

from rewrite import Pass, Refused, Spec, kept, pipeline, rewrite, roles, show, source, training

EXACT = rounding(torch.float64)


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


def live_of(toy, *steps, passes=()):
    spec = Spec.parse({"passes": list(steps)}, passes=passes)
    return rewrite(model_of(toy), spec, example=TOYS[toy].inputs(2, 7))


def encoder(**more):
    """A bidirectional encoder of transformers, with dropout."""
    sizes = dict(vocab_size=20, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56, max_position_embeddings=64)
    torch.manual_seed(0)
    return T.BertForSequenceClassification(T.BertConfig(**sizes, num_labels=3, initializer_range=0.2, **more)).eval()


def gpt2():
    torch.manual_seed(0)
    model = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=20, n_positions=64, n_embd=24, n_layer=2, n_head=4, initializer_range=0.2)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


# ---- f and copy ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Twice(Pass):
    """y = f(x) --> y = f(x) + gain * f([x, x0]).mean(1)"""

    role = "mlp"

    def params(self, y):
        return {"gain": y.new_ones(1)}

    def output(self, x, y, f, gain):
        return y + gain * f(torch.cat([x, x[:, :1]], 1)).mean(1, keepdim=True)


@dataclass(frozen=True)
class Again(Pass):
    """y = f(x) --> y = f(x) + gain * f(x)"""

    role = "linear"

    def params(self, y):
        return {"gain": y.new_ones(1)}

    def output(self, x, y, f, gain):
        return y + gain * f(x)


def gated_mlp(x, module):
    return F.linear(F.silu(F.linear(x, module.gate_proj.weight)) * F.linear(x, module.up_proj.weight), module.down_proj.weight)


def test_what_a_detach_cuts_off_is_refused():
    """Before it and behind it, in words; what another way leads to still trains."""
    side, lora = {"pass": "side_tuning", "frozen": True}, {"pass": "lora", "where": "mlp.up", "rank": 2}
    for passes, who in (([lora, side], "side_tuning"), ([side, lora], "lora")):
        with pytest.raises(Refused, match=rf"passes\[1\]: {who}: @model.layers.0.mlp.up_proj.lora.default.down is to train, and side_tuning lets no gradient through to it \(at %detach"):
            rewrite(model_of("gated"), {"passes": passes})
    for passes in ([lora, {**side, "frozen": False}], [{**lora, "where": "attention.q"}, side]):
        live = rewrite(model_of("gated"), {"passes": passes})
        TOYS["gated"].loss(live).backward()
        assert all(p.grad is not None for p in live.parameters() if p.requires_grad)


def test_f_runs_on_another_length():
    """GPT-2's linears see their input as (batch · length, width), so its body is full of sizes: those of the value that it is given."""
    model = gpt2()
    live = wake(rewrite(model, Spec.parse({"passes": [{"pass": "twice"}]}, passes=[Twice])).double())
    mlp, gain = live.transformer.h[1].mlp, tensor_of(live, "transformer.h.1.mlp.twice.default.gain")
    body = lambda x: F.gelu(x @ mlp.c_fc.weight + mlp.c_fc.bias, approximate="tanh") @ mlp.c_proj.weight + mlp.c_proj.bias
    for batch, length in ((2, 7), (3, 12)):
        x = torch.randn(batch, length, 24, dtype=torch.float64)
        result = run_site(live, model, "mlp", 1, x)
        close(reference=body(x) + gain * body(torch.cat([x, x[:, :1]], 1)).mean(1, keepdim=True), result=result, drift=EXACT)
        rejects(reference=body(x) + gain * body(x).mean(1, keepdim=True), result=result, drift=EXACT)


def run_site(live, model, role, number, x):
    """The value that a site gives now (after the passes) at another input, node by node."""
    site = [site for site in roles(captured(model)) if site.role == role][number]
    nodes = {node.name: node for node in live.graph.nodes}
    end, env = nodes[site.node.name], {node: x[..., 0] for node in live.graph.placeholders} | {nodes[site.handles["x"].name]: x}
    while "live" in end.meta:
        end = nodes[end.meta["live"]]

    def value(node):
        if node not in env:
            env[node] = tensor_of(live, node.target) if node.op == "get_attr" else node.target(*fx.node.map_arg(node.args, value), **fx.node.map_arg(node.kwargs, value))
        return env[node]

    return value(end)


@pytest.mark.parametrize("where", ["attention.q", "mlp.up", "head"])
def test_f_of_a_linear_is_the_linear_with_its_bias(where):
    live = wake(live_of("gated", {"pass": "lora", "where": where, "rank": 3}, {"pass": "again", "where": where}, passes=[Again]).double())
    with_lora = wake(live_of("gated", {"pass": "lora", "where": where, "rank": 3}).double())
    for path in with_lora.report.made:
        with torch.no_grad():
            tensor_of(with_lora, path).copy_(tensor_of(live, path))
    gains = [path for path in live.report.made if path.endswith(".gain")]
    with torch.no_grad():
        for path in gains:
            tensor_of(live, path).fill_(-0.5)
        doubled = live_of("gated", {"pass": "lora", "where": where, "rank": 3}).double()
        for path in doubled.report.made:
            tensor_of(doubled, path).copy_(tensor_of(live, path))
        module = {"attention.q": [layer.self_attn.q_proj for layer in doubled.model.layers], "mlp.up": [layer.mlp.up_proj for layer in doubled.model.layers], "head": [doubled.lm_head]}[where]
        for one in module:  # y + (-1/2) y: everything that the linear adds up is halved, its bias and its adapter too
            one.weight.data = one.weight.data * 0.5
            if one.bias is not None:
                one.bias.data = one.bias.data * 0.5
            one.lora.default.up.mul_(0.5)
    close(reference=TOYS["gated"].output(doubled), result=TOYS["gated"].output(live), drift=EXACT)
    rejects(reference=TOYS["gated"].output(with_lora), result=TOYS["gated"].output(live), drift=EXACT)


def test_f_of_one_part_of_a_fused_projection():
    model = gpt2().double()
    ids = TOYS["gated"].inputs(2, 7)["input_ids"]
    live = rewrite(model, Spec.parse({"passes": [{"pass": "again", "where": "attention.v"}]}, passes=[Again]))
    with torch.no_grad():
        result = live(ids).logits
        for block in model.transformer.h:
            block.attn.c_attn.weight.data[:, 48:] *= 2
            block.attn.c_attn.bias.data[48:] *= 2
        close(reference=model(ids).logits, result=result, drift=EXACT)
        model.transformer.h[0].attn.c_attn.bias.data[48:] *= 2
        rejects(reference=model(ids).logits, result=result, drift=EXACT)


def test_dropout_inside_a_body_follows_training():
    live = rewrite(encoder(hidden_dropout_prob=0.5), Spec.parse({"passes": [{"pass": "again", "where": "attention.block"}]}, passes=[Again]))
    ids = TOYS["gated"].inputs(2, 7)
    with torch.no_grad():
        assert torch.equal(live(**ids).logits, live(**ids).logits)
        live.train()
        assert not torch.equal(live(**ids).logits, live(**ids).logits)
    body = source(live, "bert.encoder.layer.0")
    assert body.count("dropout") >= 3 and "dropout_p" in body or body.count("training") >= 3


def test_a_body_with_a_cache_is_refused():
    with pytest.raises(Refused, match="attends to a cache"):
        live_of("gated", {"pass": "side_tuning", "where": "attention.block"})
    live_of("written", {"pass": "side_tuning", "where": ["attention.block", "block"]})


def test_a_copy_trains_and_the_frozen_body_stays():
    live = wake(live_of("gated", {"pass": "side_tuning", "where": "mlp"}).double(), size=0.5)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    mlp = live.model.layers[0].mlp
    blend, side = torch.sigmoid(mlp.side_tuning.default.gate), mlp.side_tuning.default.copy
    close(reference=blend * gated_mlp(x, mlp) + (1 - blend) * gated_mlp(x, side), result=run_site(live, model_of("gated"), "mlp", 0, x), drift=EXACT)
    rejects(reference=blend * gated_mlp(x, mlp) + (1 - blend) * gated_mlp(x, mlp), result=run_site(live, model_of("gated"), "mlp", 0, x), drift=EXACT)
    assert {path.partition(".copy.")[2] for path in live.report.made} == {"", "gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    assert all(parameter.requires_grad == ("side_tuning" in name) for name, parameter in live.named_parameters())


def test_a_copy_has_what_its_weights_are_computed_from():
    """DoRA first: the side has a direction, a magnitude and a base weight of its own, and nothing of the frozen body moves with them."""
    side = {"pass": "side_tuning", "where": "mlp"}
    live = wake(live_of("gated", {"pass": "dora", "where": "mlp.up", "rank": 2}, side).double())
    own = [path for path in live.report.made if ".copy." in path and "layers.0" in path]
    assert len(own) == 6 and sum("dora" in path for path in own) == 3
    with pytest.raises(Refused, match="its weights are quantised"):
        live_of("gated", {"pass": "quantize", "where": "mlp.up"}, side)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.lower, self.upper = (nn.ModuleList(WrittenBlock() for _ in range(2)) for _ in range(2))

    def forward(self, x):
        for block in (*self.lower, *self.upper):
            x = block(x)
        return x


def test_a_carried_value_stays_in_one_list_of_blocks():
    x = torch.randn(2, 7, 24)
    with pytest.raises(Refused, match="lower.1 and upper.0 lie in different lists of blocks"):
        rewrite(Towers(), {"passes": [{"pass": "lst", "width": 8}]}, example=(x,))
    live = rewrite(Towers(), {"passes": [{"pass": "lst", "where": {"role": "block", "path": "upper.*"}, "width": 8}]}, example=(x,))
    assert not any("lower" in path for path in live.report.made)


# ---- parts without gradients ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tap(Pass):
    """The last mlp's output is read without gradients, and what trains comes after it."""

    role = "head"
    no_grad = ("x",)

    def params(self, x):
        return {"gain": x.new_zeros(x.shape[-1])}

    def input(self, x, gain):
        return x * (1 + gain)


def test_the_part_below_runs_without_gradients():
    live = live_of("gated", {"pass": "tap"}, passes=[Tap])
    assert "with torch.no_grad():" in source(live) and "with torch.no_grad():" in source(live, "model.layers.0")
    assert show(live.graph).count("no_grad") > 50
    live.requires_grad_(True)  # whatever a user does: backward ends where the pass said
    TOYS["gated"].loss(live).backward()
    assert live.lm_head.weight.grad is not None
    assert all(parameter.grad is None for name, parameter in live.named_parameters() if "layers" in name)
    again = rewrite(model_of("gated"), {"passes": []}).requires_grad_(True)
    TOYS["gated"].loss(again).backward()
    assert all(parameter.grad is not None for name, parameter in again.named_parameters() if "layers" in name)


def test_a_tensor_that_trains_below_is_refused():
    tap = {"pass": "tap"}
    for steps in ([{"pass": "lora", "where": "attention.q", "rank": 2}, tap], [tap, {"pass": "lora", "where": "attention.q", "rank": 2}], [tap, {"pass": "unfreeze", "where": "norm"}]):
        with pytest.raises(Refused, match="a part that runs without gradients: it would never change"):
            live_of("gated", *steps, passes=[Tap])
    live_of("gated", tap, {"pass": "lora", "where": "head", "rank": 2}, passes=[Tap])
    live_of("gated", {"pass": "lora", "where": "attention.q", "rank": 2}, {"pass": "freeze", "where": "model"}, tap, passes=[Tap])


def test_parts_without_gradients_compile_copy_and_train():
    live = wake(live_of("gated", {"pass": "tap"}, passes=[Tap]))
    TOYS["gated"].loss(live).backward()
    twin = copy.deepcopy(live)
    twin.zero_grad()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    TOYS["gated"].loss(compiled).backward()
    close(reference=live.lm_head.tap.default.gain.grad, result=twin.lm_head.tap.default.gain.grad, drift=rounding(torch.float32))


# ---- bytes that wait for backward ----------------------------------------------------------------------------------------


def saved(live, toy="gated", batch=4, length=9):
    live.train()
    with kept(live) as found:
        TOYS[toy].run(live, batch, length)
    return found


def test_lora_fa_keeps_what_its_first_matrix_gives():
    """With the first matrix frozen x is not kept for it; the widths tell them apart."""
    where, width = {"role": "mlp.down", "path": "layers.1.**"}, 56  # its x comes from frozen values alone, and is kept only for the first matrix
    fa, lora = (saved(live_of("gated", {"pass": name, "where": where, "rank": 3})) for name in ("lora_fa", "lora"))
    assert any(shape[-1] == width for shape in lora.shapes) and any(shape[-1] == 3 for shape in lora.shapes)
    assert not any(shape[-1] == width for shape in fa.shapes) and any(shape[-1] == 3 for shape in fa.shapes)
    assert fa.bytes < lora.bytes


def test_full_training_keeps_more_than_lst_and_lst_only_its_taps():
    """Nothing of the sub-layers' inner width (56) or of attention waits for backward; of the model's width there is a tap for each block."""
    full, side = (saved(live_of("gated", step)) for step in ({"pass": "unfreeze", "where": "model"}, {"pass": "lst", "width": 8}))
    assert any(shape[-1] == 56 for shape in full.shapes) and not any(shape[-1] == 56 for shape in side.shapes)
    assert not any(len(shape) == 4 for shape in side.shapes)  # queries, keys and values have heads
    token = 4 * 9 * 24
    wide = [shape for shape in side.shapes if torch.Size(shape).numel() >= token]
    assert len(wide) <= 3 + 8  # taps of the embedding and of two blocks; the last norm and the head
    assert side.bytes < full.bytes / 3


def test_checkpointed_blocks_keep_their_inputs_alone():
    live = live_of("gated", {"pass": "unfreeze", "where": "model"})
    full = saved(live)
    live.gradient_checkpointing_enable()
    few = saved(live)
    assert few.bytes < full.bytes / 2 and not any(shape[-1] == 56 for shape in few.shapes)


# ---- a value from site to site -------------------------------------------------------------------------------------------


def by_hand(model, live, ids, forget=False):
    """LST's logits from the hidden states of the model given, as the paper has them."""
    hidden, side = [], live.lst.default
    hooks = [module.register_forward_hook(lambda m, i, o: hidden.append(o[0] if isinstance(o, tuple) else o)) for module in (model.model.embed_tokens, *model.model.layers)]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    g = hidden[0] @ side.entry.T
    for h, layer in zip(hidden[1:], live.model.layers):
        own = layer.lst.default
        mu = 1 / (1 + torch.exp(-own.gate / 0.1))
        z = mu * (h @ own.down.T) + (1 - mu) * (0 if forget else g)
        normed = (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, unbiased=False, keepdim=True) + 1e-5)
        g = z + F.gelu(normed @ own.inner.T) @ own.outer.T
    return model.lm_head(model.model.norm(g @ side.up.T))


def test_lst_is_the_formula_with_its_gradients():
    model = copy.deepcopy(model_of("gated")).double()
    live = wake(live_of("gated", {"pass": "lst", "width": 8}).double())
    ids = TOYS["gated"].inputs(3, 9)["input_ids"]
    close(reference=by_hand(model, live, ids), result=live(ids).logits, drift=EXACT)
    rejects(reference=by_hand(model, live, ids, forget=True), result=live(ids).logits, drift=EXACT)
    trained = [parameter for parameter in live.parameters() if parameter.requires_grad]
    wanted, found = (torch.autograd.grad(logits.square().mean(), trained) for logits in (by_hand(model, live, ids), live(ids).logits))
    for one, other in zip(wanted, found):
        close(reference=one, result=other, drift=EXACT)
    rejects(reference=wanted[0] * 1.01, result=found[0], drift=EXACT)


def test_lst_decodes_behind_a_cache():
    live = wake(live_of("gated", {"pass": "lst", "width": 8}).double())
    ids = TOYS["gated"].inputs(2, 7)["input_ids"]
    with torch.no_grad():
        whole, cache, steps = live(ids).logits, None, []
        for at in range(ids.shape[1]):
            out = live(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    close(reference=whole, result=torch.cat(steps, 1), drift=EXACT)
    rejects(reference=whole.flip(1), result=torch.cat(steps, 1), drift=EXACT)


def test_the_hidden_state_stays_the_first_thing_that_a_block_gives():
    live, seen = live_of("gated", {"pass": "lst", "width": 8}), []
    hook = live.model.layers[0].register_forward_hook(lambda module, given, out: seen.append((given[0].shape, out[0].shape, out[-1].shape)))
    TOYS["gated"].output(live)
    hook.remove()
    assert seen == [((2, 7, 24), (2, 7, 24), (2, 7, 8))]
    compiled = torch.compile(wake(live), backend="eager", fullgraph=True)
    close(reference=TOYS["gated"].output(live), result=TOYS["gated"].output(compiled), drift=rounding(torch.float32))


# ---- the ends of the model -----------------------------------------------------------------------------------------------


def test_ipa_multiplies_the_policies():
    model = copy.deepcopy(model_of("gated")).double()
    live, seen = wake(live_of("gated", {"pass": "ipa", "width": 8}).double()), []
    ids = TOYS["gated"].inputs(2, 7)["input_ids"]
    hook = model.lm_head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        base, own = model(ids).logits, live.lm_head.ipa.default
        hook.remove()
        policy = torch.softmax(F.gelu(seen[0] @ own.inner.T) @ own.outer.T, -1)
        product = torch.softmax(base, -1) * policy
        result = torch.softmax(live(ids).logits, -1)
    close(reference=product / product.sum(-1, keepdim=True), result=result, drift=EXACT)
    rejects(reference=(torch.softmax(base, -1) + policy) / 2, result=result, drift=EXACT)
    assert not any(shape[-1] == 56 for shape in saved(live).shapes)  # backward ends at the head's input


def couple(x, own, back=False):
    a, b = x[..., :12], x[..., 12:]
    first, second = (lambda h, i=i, o=o: torch.relu(h @ i.T) @ o.T for i, o in ((own.first_inner, own.first_outer), (own.second_inner, own.second_outer)))
    if back:
        b = b - second(a)
        return torch.cat([a - first(b), b], -1)
    a = a + first(b)
    return torch.cat([a, b + second(a)], -1)


def test_mad_x_undoes_its_coupling_before_a_tied_head():
    live = wake(live_of("looped", {"pass": "mad_x", "where": ["embed", "mlp", "head"], "bottleneck": 6, "coupling": 4}).double())
    own, ids = live.mad_x.default, TOYS["looped"].inputs(2, 7)["ids"]
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    close(reference=x, result=couple(couple(x, own), own, back=True), drift=EXACT)
    model = copy.deepcopy(model_of("looped")).double()
    down, up = live.block.mad_x.default.mlp.down, live.block.mad_x.default.mlp.up

    def run(undo=True):
        h = couple(model.tokens(ids), own)
        for _ in range(2):
            block = model.block
            q, k, v = (f(block.norm1(h)).unflatten(-1, (4, -1)).transpose(1, 2) for f in (block.query, block.key, block.value))
            h = h + block.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            y = block.down(F.silu(block.up(block.norm2(h))))
            h = h + y + torch.relu(y @ down.T) @ up.T
        h = model.norm(h)
        return model.head(couple(h, own, back=True) if undo else h)

    close(reference=run(), result=TOYS["looped"].output(live), drift=EXACT)
    rejects(reference=run(undo=False), result=TOYS["looped"].output(live), drift=EXACT)
    with pytest.raises(Refused, match="nothing to undo before it"):
        live_of("gated", {"pass": "mad_x", "where": ["embed", "head"], "bottleneck": 6, "coupling": 4})


def test_adapterdrop_leaves_the_first_blocks_alone():
    live = live_of("gated", {"pass": "adapterdrop", "bottleneck": 6, "drop": 1})
    assert not any("layers.0" in path for path in live.report.made) and any("layers.1" in path for path in live.report.made)
    live = live_of("gated", {"pass": "adapterdrop", "bottleneck": 6, "most": 2})
    plain = live_of("gated", {"pass": "adapter", "where": "mlp", "bottleneck": 6})
    for path in live.report.made:
        if path.endswith(("down", "up")):
            with torch.no_grad():
                tensor_of(live, path).normal_()
                tensor_of(plain, path.replace("adapterdrop", "adapter")).copy_(tensor_of(live, path))
    without = copy.deepcopy(plain)
    without.model.layers[0].mlp.adapter.default.up.data.zero_()
    live.adapterdrop.default.dropped.fill_(1)
    close(reference=TOYS["gated"].output(plain), result=TOYS["gated"].output(live), drift=0.0)
    close(reference=TOYS["gated"].output(without), result=TOYS["gated"].output(live.train()), drift=rounding(torch.float32))
    rejects(reference=TOYS["gated"].output(plain), result=TOYS["gated"].output(live), drift=rounding(torch.float32))
    steps, drawn = training(live), set()
    for _ in range(40):
        steps.before_forward()
        drawn.add(int(live.adapterdrop.default.dropped))
        steps.after_step(None)
    assert drawn == {0, 1, 2}


def test_coda_runs_the_picked_tokens_through_the_frozen_body():
    live = wake(live_of("written", {"pass": "coda", "bottleneck": 6, "reduction": 3, "turns": 5}).double(), size=1.0)
    block, own = live.blocks[1], live.blocks[1].coda.default.mlp
    mlp = lambda h: F.gelu(h @ block.up.weight.T + block.up.bias) @ block.down.weight.T + block.down.bias
    x = torch.randn(3, 11, 24, dtype=torch.float64)

    def formula(k):
        s, b = (x @ own.score.T).squeeze(-1), torch.zeros(3, 11, dtype=torch.float64)
        for _ in range(5):
            a = torch.log(torch.tensor(float(k))).double() - torch.log(torch.exp(s + b).sum(1, keepdim=True))
            b = torch.minimum(-s - a, torch.zeros_like(s))
        share = torch.exp(s + a + b)
        y = torch.relu(x @ own.down.T) @ own.up.T
        for row in range(3):
            for token in torch.argsort(share[row], descending=True)[:k]:
                y[row, token] = y[row, token] + share[row, token] * mlp(x[row, token])
        return y

    with torch.no_grad():
        close(reference=formula(4), result=run_site(live, model_of("written"), "mlp", 1, x), drift=1e-6)
        rejects(reference=formula(5), result=run_site(live, model_of("written"), "mlp", 1, x), drift=1e-6)
    with pytest.raises(Refused, match="decodes token by token behind a cache"):
        live_of("gated", {"pass": "coda", "bottleneck": 6})


def test_lpt_s_prompt_comes_late_and_backward_ends_there():
    late = {"pass": "lpt", "where": {"role": "attention", "path": "blocks.1"}, "length": 3, "bottleneck": 6, "width": 8}
    live, model = wake(live_of("written", late).double(), size=1.0), copy.deepcopy(model_of("written")).double()
    ids, made, own = TOYS["written"].inputs(2, 7)["ids"], live.lpt.default, next(m for n, m in live.blocks[1].named_modules() if n.endswith("lpt.default") or n.endswith("lpt.default.attention"))

    def run(pooled):
        x = model.blocks[0](model.tokens(ids))
        prompt = (torch.tanh(pooled(x) @ made.down.T) @ made.up.T).reshape(2, 3, 8)
        block, h = model.blocks[1], model.blocks[1].norm1(x)
        q, k, v = (f(h) for f in (block.query, block.key, block.value))
        k, v = torch.cat([prompt @ own.keys.T, k], 1), torch.cat([prompt @ own.values.T, v], 1)
        q, k, v = (one.unflatten(-1, (4, -1)).transpose(1, 2) for one in (q, k, v))
        x = x + block.out((torch.softmax(q @ k.transpose(-1, -2) / 6**0.5, -1) @ v).transpose(1, 2).flatten(2))
        x = x + block.down(F.gelu(block.up(block.norm2(x))))
        return model.head(model.norm(x).mean(1))

    close(reference=run(lambda x: x.mean(1)), result=TOYS["written"].output(live), drift=EXACT)
    rejects(reference=run(lambda x: x[:, 0]), result=TOYS["written"].output(live), drift=EXACT)
    everywhere = live_of("written", {**late, "where": "attention"})
    inner = [sum(shape[-1] == 56 for shape in saved(one, "written").shapes) for one in (live, everywhere)]
    assert 0 < inner[0] < inner[1] and saved(live.float(), "written").bytes < saved(everywhere, "written").bytes
    with pytest.raises(Refused, match="decodes token by token behind a cache"):
        live_of("gated", {**late, "where": "attention"})
