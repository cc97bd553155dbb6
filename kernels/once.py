"""What follows from tensors that stand still is made once, and belongs to no module: it is never saved.

    found = once(make, tensor, *others)         make(tensor, *others), kept as long as `tensor` lives and all of them stay as they are

Judged by address and version: a write that autograd sees, and a tensor put in another's place, are seen; one through `.data`, or by a kernel of
somebody else's, is not. So what changes while training is asked for once only where nothing trains, and given up as soon as something does.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_made = WeakTensorKeyDictionary()


def once(make, tensor, *others):
    now = [(t.data_ptr(), None if t.is_inference() else t._version) if isinstance(t, torch.Tensor) else t for t in (tensor, *others)]
    kept = _made.setdefault(tensor, {})
    found = kept.get(make)
    if found is None or found[0] != now:
        found = kept[make] = (now, make(tensor, *others))
    return found[1]


def give_up(make, tensor):
    """Forget what was made of a tensor."""
    kept = _made.get(tensor)
    if kept is not None:
        kept.pop(make, None)
