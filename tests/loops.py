"""What the tests of training share: a small model in float64, batches by number, plain loops over them."""

import copy
import functools

import torch
from checks import model_of, tensor_of
from torch.nn import functional as F

from rewrite import Spec, rewrite, training


@functools.cache
def base():
    return copy.deepcopy(model_of("gated")).double()


def batch(seed, rows=2, length=7):
    ids = torch.randint(3, 20, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def tuned(*passes, classes=(), seed=0):
    return rewrite(base(), Spec.parse({"seed": seed, "passes": list(passes)}, classes)).train()


def run(live, steps, start=0, lr=0.02, optimizer=None, micro=1, **options):
    """Losses of a plain loop over batches of its own."""
    t = training(live)
    optimizer = optimizer or t.optimizer(torch.optim.AdamW, lr, weight_decay=0.0, **options)
    return [t.step(optimizer, *(functools.partial(live, **batch(100 * i + j)) for j in range(micro))) for i in range(start, start + steps)]


def state(live):
    return {name: value.clone() for name, value in live.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def ce(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def ours(live, seed=1):
    """A run of the model with a loss in the model's own precision."""
    one = batch(seed)
    out = live(input_ids=one["input_ids"])
    out["loss"] = ce(out.logits, one["labels"])
    return out


def stir(live, seed=0, size=0.3, kinds=("down", "up", "scale", "diff", "score", "gate", "down_bias", "up_bias")):
    """Other values for what starts at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path in live.report.made:
            if path.rpartition(".")[2] in kinds:
                tensor = tensor_of(live, path)
                tensor.copy_(size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return live
