"""Reversible blocks: the formula, gradients equal to those of plain backward, bytes kept whatever the depth, caches, random numbers.

The formulas are written anew, in float64; each check has a twin that it must reject.
"""

import copy

import pytest
import torch
import transformers as T
from checks import TOYS, close, model_of, rejects, rounding, wake
from torch.nn import functional as F

from rewrite import Refused, kept, rewrite, source
from rewrite.training import reversible

EXACT = rounding(torch.float64)


def llama(layers, **more):
    torch.manual_seed(0)
    sizes = dict(vocab_size=20, hidden_size=24, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=56, max_position_embeddings=64)
    return T.LlamaForCausalLM(T.LlamaConfig(**sizes, initializer_range=0.2, **more)).eval()


def live_of(model, every=None, **options):
    return wake(rewrite(model, {"passes": [{"pass": "meft", "bottleneck": 6, "every": every, **options}]}).double(), size=0.3)


def ids_of(batch=2, length=7):
    return torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(1))


def gradients(live, ids, plain=False):
    """Gradients of what trains; `plain`: by a backward that keeps everything (the blocks called one by one)."""
    trained = {name: parameter for name, parameter in live.named_parameters() if parameter.requires_grad}
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        torch.manual_seed(3)
        output = live(input_ids=ids, use_cache=False).logits
    return dict(zip(trained, torch.autograd.grad(output.square().mean(), list(trained.values()))))


def test_gradients_are_those_of_plain_backward():
    live, ids = live_of(llama(5)).train(), ids_of()
    assert "reversible(" in source(live)
    found, wanted = gradients(live, ids), gradients(live, ids, plain=True)
    for name, gradient in wanted.items():
        close(reference=gradient, result=found[name], drift=1e-9)
        rejects(reference=gradient * 1.01, result=found[name], drift=1e-9)
    live.model.layers[2].meft.default.g_up.register_hook(lambda g: g)  # a hook on a tensor sees its gradient
    live(input_ids=ids, use_cache=False).logits.square().mean().backward()
    close(reference=wanted["model.layers.2.meft.default.g_up"], result=live.model.layers[2].meft.default.g_up.grad, drift=1e-9)


def test_a_wrong_inverse_is_seen(monkeypatch):
    live, ids, plain = live_of(llama(4)), ids_of(), reversible._call
    monkeypatch.setattr(reversible, "_call", lambda block, values, body: tuple(v * 1.001 for v in plain(block, values, body)) if "inverse" in (body or "") else plain(block, values, body))
    with pytest.raises(Refused, match="gradients would be wrong"):
        gradients(live, ids)


def test_kept_bytes_do_not_grow_with_depth():
    def saved(layers, plain=False):
        live = live_of(llama(layers)).train()
        with kept(live) as found, pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
            live(input_ids=ids_of(), use_cache=False)
        return found.bytes

    four, six = saved(4), saved(6)
    assert four == six < saved(4, plain=True)


def test_errors_that_grow_are_refused_or_met_by_keeping_more():
    """In float32 a division by 0.1 for each block leaves nothing of a gradient after twelve; with every third block kept it is there."""
    model, ids = llama(12), ids_of()
    few, more = (live_of(model, every=every).float() for every in (None, 3))
    with pytest.raises(Refused, match="computed back from what left the last one with an error"):
        gradients(few, ids)
    found, wanted = gradients(more, ids), gradients(more, ids, plain=True)
    for name, gradient in wanted.items():
        close(reference=gradient, result=found[name], drift=1e-2)


def test_it_is_the_formula():
    model = llama(4).double()
    live, ids = live_of(llama(4), alpha=0.5, beta=0.8), ids_of()

    def by_hand(alpha, beta=0.8):
        x = model.model.embed_tokens(ids)
        c, rotary = x, model.model.rotary_emb(x, torch.arange(7)[None])
        for block, own in zip(model.model.layers, live.model.layers):
            own = own.meft.default
            y = block(x, attention_mask=None, position_embeddings=rotary)
            y = y[0] if isinstance(y, tuple) else y
            y = alpha * c + y + F.relu(y @ own.f_down.T) @ own.f_up.T
            x, c = y, beta * x + F.relu(y @ own.g_down.T) @ own.g_up.T
        return model.lm_head(model.model.norm(x + alpha * c))

    close(reference=by_hand(0.5), result=live(input_ids=ids).logits, drift=EXACT)
    rejects(reference=by_hand(0.5, 0.81), result=live(input_ids=ids).logits, drift=EXACT)
    trained = [parameter for parameter in live.parameters() if parameter.requires_grad]
    wanted, found = (torch.autograd.grad(logits.square().mean(), trained) for logits in (by_hand(0.5), live(input_ids=ids, use_cache=False).logits))
    for one, other in zip(wanted, found):
        close(reference=one, result=other, drift=1e-9)


def test_dropout_draws_the_same_again():
    live, ids = live_of(llama(5, attention_dropout=0.3)).train(), ids_of()
    found, wanted = gradients(live, ids), gradients(live, ids, plain=True)
    for name, gradient in wanted.items():
        close(reference=gradient, result=found[name], drift=1e-9)
    torch.manual_seed(4)
    other = live(input_ids=ids, use_cache=False).logits
    torch.manual_seed(5)
    assert not torch.equal(other, live(input_ids=ids, use_cache=False).logits)


def test_it_decodes_behind_a_cache():
    live, ids = live_of(llama(4)), ids_of()
    with torch.no_grad():
        whole, cache, steps = live(input_ids=ids).logits, None, []
        for at in range(ids.shape[1]):
            result = live(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            steps.append(result.logits)
    close(reference=whole, result=torch.cat(steps, 1), drift=EXACT)
    rejects(reference=whole, result=torch.cat(steps[::-1], 1), drift=EXACT)


def test_copies_and_other_passes():
    model, ids = llama(5), ids_of()
    steps = [{"pass": "lora", "where": "attention.q", "rank": 2}, {"pass": "meft", "bottleneck": 6}]
    live = wake(rewrite(model, {"passes": steps}).double(), size=0.3)
    twin = copy.deepcopy(live)
    found, wanted = gradients(twin, ids), gradients(live, ids, plain=True)
    assert any("lora" in name for name in wanted)
    for name, gradient in wanted.items():
        close(reference=gradient, result=found[name], drift=1e-9)
    # what a later pass puts after the sum is no part of F: the block is no reversible one any more, and kept as any other
    late = wake(rewrite(model, {"passes": [*steps, {"pass": "adapter", "where": "block", "bottleneck": 4}]}).double(), size=0.3)
    assert "reversible(" not in source(late)


def test_the_toys_have_it():
    live = rewrite(model_of("gated"), {"passes": [{"pass": "meft", "bottleneck": 6}]}, example=TOYS["gated"].inputs(2, 7))
    TOYS["gated"].loss(live).backward()
