"""What a pass file says: options, facts, `refuse`, `params`, nouns.

A pass is a frozen dataclass: its fields are the options of the spec. `refuse`, `params`, `trains` and the nouns ask by argument name for what
they need:

    x w b y                 linear, conv, embedding (x are ids), experts, norm; w is out × in whatever the model stores
    q k v mask y            attention
    stream branch y         residual
    x y                     mlp, attention.block, block
    op(x, w)                the site's own operation with another weight, without bias
    mix(h, m)               m (out × rank) over the channels of h: a 1×1 convolution on a conv, one matrix per expert on experts
    f(x)                    the site's own body, frozen tensors and earlier passes included, on another x of any length
    key_of(t) value_of(t)   the keys or values that an attention would make of other tokens, put where the input of its block stands
    copy(x)                 the same code on tensors of its own, which start as the base's values and train
    norm(y)                 what the norm after the residual add would give, had the sub-layer given y (post-norm models)
    block_x sublayer_x      further out: the input of the block, of the sub-layer (mlp, attention.block) around the site
    embeds                  the output of the embedding
    choices                 in a mixing pass (`by` of a choose): the values that the steps of the choose give where the noun has its own, a tuple
    x y                     logits: what the head reads, what the model gives
    training                the site's own flag
    role index kind fan_in  the site's role; the number of its block; "linear", "conv", "embedding", "experts" or None; inputs of one output
    tied                    is its weight another module's too (a head that reads the embedding back)?
    key_heads               of attention: how many heads of keys differ (fewer than k has, where each serves several heads of queries)
    positions               the value by which the model counts its tokens, where there is one
    <name>                  a new tensor of `params` or `shared`, or an input of `inputs`

`derive` asks for `w`, `b`, facts and the frozen tensors of `params`, `measure` for all of these and for what `derive` gives. `derive` gives what follows from the base: under `w` or `b` the base
tensor's new value on this live model, under another name a new frozen tensor. It is not saved but made anew on load, and compared bit for bit.

A noun names the value that it replaces: `input` x, `weight` w, `bias` b, `output` y, `query` q, `key` k, `value` v, `branch`, `stream`. A noun
whose value a site does not have is left out there, and so is one that returns its value as it is. `key` and `value` may put more places in
front (`in_front`), both as many: masks and biases grow with them, and a cache keeps the model's own keys. `positions` is replaced once for the
whole model.

A value may go from site to site, in graph order: `start` gives the first one at the first site, `carry` the one that leaves a site from the one
that came; every noun may ask for the one that came, as `carry`. At the last site `end` may make a new y of the one that leaves there.

What happens while training is said in hooks (`rewrite.training` calls them, once per optimizer step). They ask by name for

    sites                   all sites of the step as views: `.path`, `.role`, `.w`, `.w_grad`, and each tensor by its name
    <name>                  a tensor of `shared`
    done generator          optimizer steps that the model has seen; a generator seeded by (spec seed, site, done)
    lr optimizer            lr(tensor) is its learning rate; the optimizer itself
    forward forwards loss   run the model: one micro-batch and all of them (prepare, loss); the mean loss of the step (step)

    prepare(sites, forwards)    before training: scores, masks, calibration
    before_forward(sites, …)    what is drawn for this step: write it into frozen tensors, whose shapes stay
    loss(forward, …)            the loss of a micro-batch, where the model's own is not enough
    penalty(sites, …)           a scalar beside the loss, a differentiable function of the step's tensors
    after_backward(sites, …)    gradients are there: mask or scale them
    step(loss, lr, …)           instead of backward and the optimizer's step
    after_step(sites, …)        the optimizer has stepped, the gradients are still there
    groups()                    factors of the learning rate, by name of tensor
    choose(sites, …)            a choice made by hand, `rewrite.training(live).choose(rank=4)`: its own arguments are the keywords
    compacted(site)             for `rewrite.compact`: (options, tensors) that are left of a site, None where nothing is
"""

import functools
import inspect
from dataclasses import dataclass
from typing import ClassVar

import torch

REPLACES = {"input": "x", "weight": "w", "bias": "b", "output": "y", "query": "q", "key": "k", "value": "v", "branch": "branch", "stream": "stream", "positions": "positions"}
#: what a body may ask for beside handles and tensors: functions of the site, and facts of it
FUNCTIONS = ("op", "mix", "norm", "f", "copy", "key_of", "value_of")
FACTS = ("role", "index", "kind", "fan_in", "key_heads", "tied")
#: values from further out
OUTER = ("block_x", "sublayer_x", "embeds")
#: the methods that thread a value from site to site
CARRIES = ("start", "carry", "end")
#: in the order in which they are called; those of _STACKED touch tensors alone, no gradients and no optimizer
_STACKED = {"before_forward", "penalty", "groups", "choose"}
HOOKS = ("prepare", "before_forward", "loss", "penalty", "after_backward", "step", "after_step", "groups", "choose")


@dataclass(frozen=True)
class Pass:
    """A named, optioned graph → graph step.

    `role` is the default `where`; `drift` the allowed relative change of the output at initialisation (0.0 = bit-equal, None: a change is
    its nature, and `measure` has figures of it where the pass has any); `example` a step of a spec that shows the pass, `shown_after` the steps that it wants before it, `shown_over` those that a
    mixing pass chooses from; `freezes_choices`: a mixing pass trains alone; `whole` says that it takes the parts of a
    fused projection as one site; `requires(graph)` gives the reason why the graph is not ready for
    it, or None. `whole_sequence`: it looks at all tokens of a sequence at once, and cannot stand where the model decodes behind a cache.
    `no_grad` names handles that backward must not go beyond: all that they are computed from runs under torch.no_grad.
    `reversible`: `output` and `carry` are `a * carry + F(x)` and `b * x + G(y)`, so that blocks are computed back
    rather than kept for backward: all of them (True), or all but every n-th.
    `inputs` (name → `Input`; a property where options decide) are what calls of the model take beside its own. `lengthens` says that
    `output` on `embed` puts tokens in front of the model's own: masks, positions, token types, labels and caches follow, and the caller sees
    none of it. Its nouns at other sites stand where these tokens are read, not behind a cache that holds them. A pass that is not site-shaped defines `apply(self, edit, sites)` instead of nouns. `drawn` are the frozen tensors that a
    hook draws anew for each step and that the nouns read in training alone. `unfuses`: it takes fused operations apart where it finds some.
    """

    role: ClassVar[str | list | None] = None
    drift: ClassVar[float | None] = 0.0
    lengthens: ClassVar[bool] = False
    example: ClassVar[dict] = {}
    shown_after: ClassVar[tuple[dict, ...]] = ()
    shown_over: ClassVar[tuple[dict, ...]] = ()
    freezes_choices: ClassVar[bool] = False
    no_grad: ClassVar[tuple[str, ...]] = ()
    reversible: ClassVar[bool | int] = False
    whole_sequence: ClassVar[bool] = False
    drawn: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[dict] = {}
    whole: ClassVar[bool] = False
    unfuses: ClassVar[bool] = False

    def requires(self, graph):
        """Why the graph is not ready for this pass, or None."""
        return None

    def refuse(self):
        """Why the pass declines a site, or None; asks for what it needs by argument name."""
        return None

    def params(self):
        """The new tensors of a site, by name: trainable, or `frozen(tensor)`. Runs under a generator seeded by (spec seed, site)."""
        return {}

    def shared(self, sites):
        """New tensors that all sites share, by name. `sites` give `.w`, `.x`, … as `params` would see them."""
        return {}

    def derive(self):
        """What follows from the base (and from frozen tensors of `params`), by name: `w` or `b`, the base tensor's new value; others, new frozen tensors."""
        return {}

    def measure(self):
        """Figures of a site for the report, by name; asks for what `derive` asks for (before it) and for what it gives."""
        return {}

    def trains(self):
        """Names of handles whose base tensor the pass lets train."""
        return ()

    def writes(self):
        """Names of handles whose base tensor a hook writes: the live model gets a copy of its own, which does not train and is saved."""
        return ()

    def remembers(self):
        """What hooks remember of a site between steps, by name: buffers that no noun reads. Asks like `params`, and for the tensors of `params`."""
        return {}

    def unstacked(self):
        """What of the pass cannot work on the stacked tensors of a batch of adapters: hooks that see gradients, memory, writes to the base."""
        own = [name for name in ("remembers", "writes") if getattr(type(self), name) is not getattr(Pass, name)]
        return (*(name for name in self.hooks() if name not in _STACKED), *own)

    def hooks(self):
        """The hooks of this pass, in the order of HOOKS; `groups` where it asks for another learning rate."""
        return tuple(name for name in HOOKS if hasattr(self, name) and (name != "groups" or self.groups()))

    @classmethod
    def mixes(cls):
        """Is this a mixing pass: does a noun of it ask for `choices`?"""
        return any("choices" in _parameters(getattr(cls, noun)) for noun in cls.nouns())

    @classmethod
    def shown(cls, name):
        """The steps of a spec that shows the pass, which is called `name` there; its own stands last."""
        step = {"pass": name, **cls.example}
        return [*cls.shown_after, {"choose": [*cls.shown_over], "by": step} if cls.mixes() else step]

    @classmethod
    def bodies(cls):
        """The methods of this pass that become nodes: its nouns, and those that thread a value from site to site."""
        return (*cls.nouns(), *(name for name in CARRIES if hasattr(cls, name)))

    @classmethod
    def words(cls):
        """Every name that the engine reads off a pass: facts, methods, nouns, hooks."""
        return {*(name for name in dir(Pass) if not name.startswith("_")), *REPLACES, *CARRIES, *HOOKS, "apply", "compacted"}

    def combined(self, parts):
        """(options, tensors) of the weighted sum of adapters at a site, or None. `parts`: (options, weight, name → tensor) of each; here the tensors' sum."""
        if any(options != parts[0][0] for options, _, _ in parts):
            return None
        return parts[0][0], {name: sum(weight * tensors[name] for _, weight, tensors in parts) for name in parts[0][2]}

    @classmethod
    def nouns(cls):
        """The nouns that this pass defines, in the order of REPLACES."""
        return tuple(name for name in REPLACES if hasattr(cls, name))


@dataclass(frozen=True)
class Input:
    """An input beside the model's own, an entry for each row of the batch: (batch, *shape).

    default: what each entry is where a call leaves the input out; None: it must be given. values: the integers that it may hold, None for any.
    """

    default: int | float | None = None
    dtype: torch.dtype = torch.int64
    shape: tuple[int, ...] = ()
    values: range | None = None


@dataclass(frozen=True)
class Frozen:
    """A new tensor that does not train: a buffer, saved with the adapter."""

    tensor: torch.Tensor


def frozen(tensor):
    """Mark a tensor of `params` or `shared` as one that does not train."""
    return Frozen(tensor)


@functools.lru_cache(maxsize=None)
def _parameters(function):
    return dict(list(inspect.signature(function).parameters.items())[1:])


def wants(method):
    """The names that a method of a pass asks for."""
    return tuple(_parameters(method.__func__))


def has_default(method, name):
    """Can a method of a pass do without this name?"""
    return _parameters(method.__func__)[name].default is not inspect.Parameter.empty
