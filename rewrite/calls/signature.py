"""How a model is called: each call finds its graph and its flat inputs (`bind`), and gets back what the original returns (`pack`).

    live(input_ids=…, past_key_values=cache)  -->  Call("past", [ids, mask, positions, k0, v0, …])
    [logits, k0, v0, …]                       -->  CausalLMOutputWithPast(logits=…, past_key_values=cache)

What a graph cannot do is refused in words before anything runs. A `Signature` holds no tensor and no module; it can be pickled and
copied, and torch.compile traces through it.

Where it differs from the original: a call with labels, or in training mode, returns no cache unless it says `use_cache=True`; caches
are kept at full length where the model attends through a sliding window (the mask does the window); `logits_to_keep` takes its rows
after the head.
"""

import contextlib
import inspect
from dataclasses import dataclass, replace

import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from ..errors import Refused
from ..graph import attribute
from . import caches
from .hidden import HiddenStates
from .inputs import takes_use_cache
from .leaves import Tree, leaves, rebuild
from .slots import CACHE, Check, Slot, checks_of, resized, slots_of
from .variants import Variant, is_hugging_face, variants

__all__ = ["Call", "Signature", "Variant", "leaves", "rebuild", "sign", "variants"]

FLAGS = frozenset({"use_cache", "return_dict", "logits_to_keep", "output_hidden_states", "output_attentions", "cache_position", "is_first_iteration"})
LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")
REASONS = {
    "inputs_embeds": "was not captured: the graph begins at the ids, the embedding is part of it. Hand over input_ids",
    "decoder_inputs_embeds": "was not captured: the graph begins at the ids, the embedding is part of it. Hand over decoder_input_ids",
    "position_ids": "was not captured: this model makes its positions itself. Leave it out",
    "return_loss": "asks for a loss that was not captured. Compute it from the logits",
}
NEXT = "was not captured. Leave it out, or capture again with an example that has it: example={…}"


class Call:
    """One call on its way: `name` of the graph, `values` its flat inputs; the rest is for `pack`.

    watched: None, or {(kind, block path): tensor}, which `watching` fills while the graph runs.
    """

    __slots__ = ("name", "values", "given", "cache", "watched")

    def __init__(self, name, values, given, cache, watched):
        self.name, self.values, self.given, self.cache, self.watched = name, values, given, cache, watched


@dataclass(frozen=True)
class Entry:
    """One graph as it is entered and left.

    own, cross: the layers of its cache. keeps: it returns a cache. fields: (name, Tree, first leaf, leaf behind the last) of each
    thing that it returns; empty where it returns no ModelOutput. handed: the names of inputs that are outputs as they are.
    """

    name: str
    slots: tuple[Slot, ...]
    names: frozenset[str]
    constants: dict[str, object]
    own: caches.Layers | None
    cross: caches.Layers | None
    keeps: bool
    checks: tuple[Check, ...]
    words: dict[str, str]
    tree: Tree
    fields: tuple[tuple[str, Tree, int, int], ...]
    handed: tuple[str, ...]
    inputs: tuple[str, ...]

    @classmethod
    def of(cls, graph, variant, tree):
        slots, found, words = slots_of(graph, variant)
        both = any(name.startswith(f"{CACHE}.self.") for name in (*graph.inputs, *graph.outputs))
        fields, place = [], 0
        if tree.kind == "output":
            for name, child in zip(tree.names, tree.children):
                fields.append((name, child, place, place + _count(child)))
                place += _count(child)
        return cls(
            variant.name,
            slots,
            frozenset(slot.name for slot in slots) | {CACHE if variant.kwargs.get(CACHE) is not None else ""},
            {name: value for name, value in variant.kwargs.items() if isinstance(value, (bool, int, float, str)) and name not in FLAGS},
            caches.layers_of(found, f"{CACHE}.self." if both else f"{CACHE}."),
            caches.layers_of(found, f"{CACHE}.cross."),
            CACHE in tree.names,
            checks_of(graph, words),
            words,
            tree,
            tuple(fields),
            tuple(_handed(tree)),
            tuple(graph.inputs),
        )

    def grown(self, name, added, symbol):
        """The same graph with one more input behind the others."""
        words = next((slot.words for slot in self.slots if slot.words), {})
        sizes = ((0, symbol), *enumerate(added.shape, 1))
        slot = Slot(name, added.dtype, sizes, len(sizes), words=words, default=added.default, values=added.values)
        return replace(self, slots=(*self.slots, slot), names=self.names | {name}, inputs=(*self.inputs, name))

    def unlabelled(self):
        """The same graph without labels and loss, as `emit.unlabelled` makes it."""
        slots = tuple(slot for slot in self.slots if slot.default != "label")
        gone = {slot.name for slot in self.slots if slot.default == "label"}
        fields, shift = [], 0
        for name, tree, start, end in self.fields:
            if name == "loss":
                shift = end - start
            else:
                fields.append((name, tree, start - shift, end - shift))
        inputs = tuple(name for name in self.inputs if name not in gone)
        return replace(self, name="unlabelled", slots=slots, names=self.names - gone, fields=tuple(fields), inputs=inputs)


@dataclass(eq=False)
class Signature:
    """The calls of one module (the whole model, or its encoder) and the graphs that serve them. Made by `sign`.

    front: how many tokens passes have put in front of the caller's, which its cache holds as well; cut: the outputs that they are cut from.
    """

    what: str
    names: tuple[str, ...]
    is_open: bool
    fixed: dict[str, object]
    entries: dict[str, Entry]
    hugging_face: bool
    caching: bool
    encoder: str | None
    encodes: tuple[str, ...]
    labels: tuple[str, ...]
    loss: object
    shifts: object
    hidden: HiddenStates
    ignored: tuple[str, ...]
    added: tuple[str, ...] = ()
    front: int = 0
    cut: tuple[str, ...] = ()

    @classmethod
    def of(cls, model, graphs, variants, trees, owner=""):
        """The signature of the module at the path `owner`.

        graphs: {variant name: Graph}, placeholders with fake values in the order of `Graph.inputs`. variants: the list that was
        captured. trees: {variant name: Tree of what it returns}, from `leaves(output, known)` in the trace.
        """
        module = attribute(model, owner)
        own = [v for v in variants if v.owner == owner and v.name in graphs]
        encodes = (v for v in variants if v.name == "encoder" and not owner)
        # one that is opaque stays as it is and is called as it is; one that is neither has rewritten blocks inside and no way in
        encoder = next((v for v in encodes if v.name in graphs or any(v.owner in graph.opaque for graph in graphs.values())), None)
        if not {"first", "next"} <= graphs.keys() or (encoder is None and not owner):
            own = [v for v in own if v.name not in ("first", "next")]
        if encoder is None and not owner:
            own = [v for v in own if v.name != "decoder"]
        parameters = inspect.signature(module.forward).parameters
        entries = {v.name: Entry.of(graphs[v.name], v, trees[v.name]) for v in own}
        if any(slot.default == "label" for slot in entries[own[0].name].slots):
            entries["unlabelled"] = entries[own[0].name].unlabelled()
        return cls(
            what=type(module).__name__,
            names=tuple(n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)),
            is_open=any(p.kind is p.VAR_KEYWORD for p in parameters.values()),
            fixed={n: p.default for n, p in parameters.items() if isinstance(p.default, (bool, int, float, str))},
            entries=entries,
            hugging_face=is_hugging_face(module),
            caching=is_hugging_face(module) and module.can_generate() and takes_use_cache(module),
            encoder=encoder and encoder.owner,
            encodes=tuple(encoder.kwargs) if encoder else (),
            labels=own[0].labels,
            loss=own[0].loss,
            shifts=own[0].shifts,
            hidden=HiddenStates.of(own[0].hidden, graphs[own[0].name].blocks, owner),
            ignored=own[0].ignored,
        )

    def grown(self, name, added=None, graph=None, symbol=None):
        """The same with an input of a pass's own (`added`, an Input), which the graph of that name reads, if any: its batch is the size `symbol`."""
        entries, first = dict(self.entries), next(iter(self.entries))
        for key in (graph, "unlabelled", "whole") if graph == first else (graph,):
            if key in entries:
                entries[key] = entries[key].grown(name, added, symbol)
        return replace(self, entries=entries, added=tuple(dict.fromkeys((*self.added, name))))

    def with_loss(self, logits):
        """The same calls, and the one that gives its loss in the place of its logits, from labels."""
        main = next(iter(self.entries.values()))
        fields = tuple(("loss" if name == logits else name, *rest) for name, *rest in main.fields)
        return replace(self, entries=self.entries | {"loss": replace(main, name="loss", fields=fields)})

    def parted(self, name, new):
        """The same calls, one of them under a new name too."""
        return replace(self, entries=self.entries | {new: replace(self.entries[name], name=new)})

    def lengthened(self, graphs, cut):
        """The same calls of graphs (by name) in which tokens stand in front; they are cut from the outputs named."""
        entries = {}
        for name, entry in self.entries.items():
            graph = graphs.get(name)
            if graph is not None:
                entries[name] = replace(entry, slots=resized(entry.slots, graph), checks=checks_of(graph, entry.words))
        main = next(iter(entries.values()))
        if "unlabelled" in self.entries:
            entries["unlabelled"] = main.unlabelled()
        if cut and self.loss is not None:
            entries["whole"] = replace(main, name="whole")
        return replace(self, entries=entries, front=graphs[main.name].front if self.encoder is None else 0, cut=cut)

    # ---- in

    def bind(self, live, args, kwargs):
        """The Call of these arguments. Raises Refused with place, reason and next step, and TypeError where Python would."""
        given = self._given(args, kwargs)
        if self.shifts and given.get("decoder_input_ids") is None and given.get("labels") is not None:
            given["decoder_input_ids"] = self._shifted(live, given["labels"])
        watched = self.hidden.asked(live, given, self.what) if self.hugging_face else None
        cache = caches.accept(given.get(CACHE), self.encoder is not None, self.what) if given.get(CACHE) is not None else None
        entry = self._choose(live, given, watched)
        names = entry.names
        for name in given:
            if name not in names and given[name] is not None:
                self._stray(entry, name, given[name])
        self._refuse_packed(entry, given)
        if cache is None and entry.keeps:
            cache = caches.accept(None, self.encoder is not None, self.what)
        sizes, values, late, what = {}, [], [], self.what
        for slot in entry.slots:
            if slot.name == CACHE:
                values += self._cached(live, entry, cache, values, sizes)
                continue
            value = slot.take(given)
            if value is not None:
                value = slot.admit(value, sizes, what)
            elif slot.default in (None, "label") and not slot.unused:
                raise Refused(f"{what}: {slot.name} is missing; the graph takes {slot.picture()}.")
            if value is None or slot.derived:
                late.append((len(values), slot))
            values.append(value)
        if late:
            device = next(value.device for value in values if value is not None)
            for place, slot in late:
                if values[place] is None:
                    values[place] = slot.make(sizes, device, given.get("attention_mask"), given.get("input_ids"))
                else:
                    slot.agree(values[place], sizes, what)
        for check in entry.checks:
            check.hold(sizes, entry.words, what)
        if entry.name == "loss":
            values += self._targets(given, values[0].device)
        return Call(entry.name, values, given, cache, watched)

    def _given(self, args, kwargs):
        if not args:
            return dict(kwargs)
        if len(args) > len(self.names):
            raise TypeError(f"{self.what}.forward() takes {len(self.names)} positional arguments but {len(args)} were given")
        given = dict(zip(self.names, args))
        for name in kwargs:
            if name in given:
                raise TypeError(f"{self.what}.forward() got multiple values for argument '{name}'")
            given[name] = kwargs[name]
        return given

    def _shifted(self, live, labels):
        if isinstance(self.shifts, str):
            return getattr(live, self.shifts)(labels)
        return self.shifts(labels, live.config.pad_token_id, live.config.decoder_start_token_id)

    def _choose(self, live, given, watched):
        """The graph that serves this call; runs the encoder's where its outputs are needed and were not handed over."""
        labelled = any(given.get(name) is not None for name in self.labels)
        main = next(iter(self.entries.values())) if labelled or "unlabelled" not in self.entries else self.entries["unlabelled"]
        if labelled and "whole" in self.entries:
            main = self.entries["whole"]
        if labelled and "loss" in self.entries and _asks_for_the_loss_alone(live, given):
            main = self.entries["loss"]
        if not self.caching:
            return self._apart(given, main)
        cache, wanted = given.get(CACHE), given.get("use_cache")
        if "past" not in self.entries and "next" not in self.entries:
            if wanted:
                raise Refused(
                    f"{self.what}: use_cache=True, but no variant with a cache was captured.\n"
                    "Call with use_cache=False; generate(use_cache=False) gives the same tokens, only more slowly."
                )
            return self._apart(given, main)
        if wanted is None:
            wanted = not labelled and not live.training and getattr(live.config, "use_cache", False)
        elif wanted and live.training and live.is_gradient_checkpointing:
            wanted = False  # as the original decides
        if cache is None and not wanted and given.get("encoder_outputs") is None:
            return main
        if labelled and self.loss is None:
            raise Refused(
                f"{self.what}: {self.labels[0]} together with a cache, but its loss is part of the graph without one.\n"
                f"Leave out the cache, or {self.labels[0]}."
            )
        if "past" in self.entries:
            if labelled and self.front:
                raise Refused(f"{self.what}: {self.labels[0]} together with a cache, which a prompt in front does not go with.\nLeave out the cache, or {self.labels[0]}.")
            return self.entries["first" if "first" in self.entries and not caches.holds(cache) else "past"]
        if given.get("encoder_outputs") is None:
            kept = {name: given[name] for name in self.encodes if given.get(name) is not None}
            with contextlib.nullcontext() if watched is None else self.hidden.watching(live, watched):
                given["encoder_outputs"] = attribute(live, self.encoder)(**kept, return_dict=True)
        return self.entries["next" if caches.is_filled(cache) else "first"]

    def _apart(self, given, main):
        """Without a cache: the decoder's graph where the encoder has run, the main one otherwise."""
        return main if given.get("encoder_outputs") is None else self.entries.get("decoder", main)

    def _stray(self, entry, name, value):
        """An argument that is no input of the graph: harmless, or refused with the reason."""
        if name in FLAGS:
            if name == "output_attentions" and value:
                raise Refused(
                    f"{self.what}: output_attentions=True, but attention weights are no outputs of the captured graph.\n"
                    "Ask the original model for them."
                )
            return
        if name in self.added or name in self.labels or name in self.ignored or (self.loss is not None and name in LOSS_ARGUMENTS):
            return
        if name in entry.constants and not isinstance(value, torch.Tensor):
            if entry.constants[name] != value:
                raise Refused(
                    f"{self.what}: captured with {name}={entry.constants[name]!r}, called with {name}={value!r}.\n"
                    "Capture again with an example that says so."
                )
            return
        if not isinstance(value, torch.Tensor) and (value is False or (name in self.fixed and self.fixed[name] == value)):
            return
        if name not in self.names and not self.is_open:
            raise TypeError(f"{self.what}.forward() got an unexpected keyword argument '{name}'")
        if name == "num_items_in_batch":
            raise Refused(
                f"{self.what}: the loss is part of the captured graph and cannot be divided by num_items_in_batch.\n"
                "Leave it out and scale the loss returned."
            )
        if name in self.names and any(name in other.names for other in self.entries.values()):
            return  # an input of the encoder, whose outputs are at hand
        raise Refused(f"{self.what}: {name} {REASONS.get(name, NEXT)}.")

    def _refuse_packed(self, entry, given):
        positions = given.get("position_ids")
        if entry.own is None and "position_ids" in entry.names and positions is not None and given.get("attention_mask") is None:
            if not torch.compiler.is_compiling() and (positions.diff(dim=-1) == 1).all():
                return  # each row is one sequence, as generate(use_cache=False) hands them over
            raise Refused(
                f"{self.what}: position_ids without attention_mask, by which the original tells sequences packed into one row apart; "
                "that was not captured.\n"
                "Hand over an attention_mask (all ones) if the rows are not packed; unpack them if they are."
            )

    def _cached(self, live, entry, cache, values, sizes):
        """The leaves of the cache in the order of the graph; layers of length 0 where it is empty."""
        own, cross = (cache, None) if entry.cross is None else (cache.self_attention_cache, cache.cross_attention_cache)
        found = [] if entry.own is None else entry.own.take(own, sizes, self.what, self.front)
        if found is None:
            found = entry.own.empty(live, values[0].device, sizes)
        if cross is not None:
            found += entry.cross.take(cross, sizes, self.what)
        return found

    def watching(self, live, call):
        """A context in which the graph runs if `call.watched` is not None: reads its hidden states on the way."""
        return self.hidden.watching(live, call.watched)

    # ---- out

    def pack(self, live, call, flat):
        """What the original returns, from the flat outputs of the graph; the user's cache is brought up to date."""
        entry, given = self.entries[call.name], call.given
        handed = {name: call.values[entry.inputs.index(name)] for name in entry.handed if not name.startswith(CACHE)}
        if not entry.fields or not self.hugging_face:
            found = rebuild(entry.tree, flat, handed)
            return found.to_tuple() if entry.fields and given.get("return_dict") is False else found
        fields, labelled = {}, any(given.get(name) is not None for name in self.labels)
        for name, tree, start, end in entry.fields:
            if tree.kind == "tensor":
                fields[name] = flat[start]
            elif name == CACHE:
                caches.store(call.cache, tree, flat, start, self.front)
                fields[name] = call.cache
            else:
                fields[name] = rebuild(tree, flat[start:end], handed)
        if given.get("use_cache") is False and given.get(CACHE) is None:
            fields.pop(CACHE, None)
        keep = given.get("logits_to_keep")
        if _keeps_some(keep):
            fields["logits"] = self._kept(fields["logits"], keep)
        if self.loss is not None and labelled and call.name != "loss":
            fields["loss"] = self._lose(live, given, fields)
        if call.name == "whole":
            fields.update({name: fields[name][:, self.front :] for name in self.cut})
        if call.watched is not None:
            states = self.hidden.collect(live, call.watched)
            fields.update({name: tuple(state[:, self.front :] for state in every) for name, every in states.items()} if self.cut else states)
        output = entry.tree.cls(**fields)
        tuples = given.get("return_dict")
        if tuples is None:
            tuples = getattr(live.config, "return_dict", True)
        return output if tuples else output.to_tuple()

    def _lose(self, live, given, fields):
        """The loss as the model itself comes to it, with what the caller adds (`num_items_in_batch`)."""
        given = self._in_front(given)
        places = {"output": fields, "label": given}

        def read(reference):
            kind, *value = reference
            return live.config if kind == "config" else value[0] if kind == "value" else places[kind][value[0]]

        extra = {name: given[name] for name in LOSS_ARGUMENTS if given.get(name) is not None}
        named = {name: read(reference) for name, reference in self.loss.kwargs}
        return live.loss_function(*[read(reference) for reference in self.loss.args], **named, **extra)

    def _in_front(self, given):
        """The arguments with labels that count nothing for the tokens in front."""
        if not (self.front and self.cut):
            return given
        unlabelled = lambda labels: labels.new_full((labels.shape[0], self.front), -100)  # noqa: E731
        return given | {name: torch.cat([unlabelled(given[name]), given[name]], 1) for name in (*self.labels, "shift_labels") if given.get(name) is not None}

    def _targets(self, given, device):
        """What each token is to say, and the number that the sum of losses is divided by: as the loss of causal language models has them."""
        given = self._in_front(given)
        targets, items = given.get("shift_labels"), given.get("num_items_in_batch")
        if targets is None:
            targets = torch.nn.functional.pad(given["labels"], (0, 1), value=-100)[..., 1:]
        targets = targets.to(device)
        return targets, (targets != -100).sum() if items is None else torch.as_tensor(items, device=device)

    def _kept(self, logits, keep):
        if isinstance(keep, int):
            return logits[:, -keep:]
        if keep.dim() == 1:
            return logits[:, keep]
        raise Refused(f"{self.what}: logits_to_keep of {keep.dim()} dimensions; the live model takes a number or positions in one dimension.")


def sign(model, main, variants, trees):
    """Give `main` and its variants their signatures: one per module that is called, on every graph of that module.

    main: the Graph named by the first of `variants`, the others in `main.variants`. trees: see `Signature.of`.
    """
    graphs = {graph.name: graph for graph in main.all()}
    made = {}
    for graph in main.all():
        if graph.owner not in made:
            made[graph.owner] = Signature.of(model, graphs, variants, trees, graph.owner)
        graph.signature = made[graph.owner]
    return main


def _count(tree):
    return 1 if tree.kind == "tensor" else sum(_count(child) for child in tree.children)


def _asks_for_the_loss_alone(live, given):
    """In training mode nobody asks for logits but by `logits_to_keep`; and the loss must still be what the op makes."""
    if not live.training or given.get("labels") is None or given.get("ignore_index", -100) != -100:
        return False
    return not _keeps_some(given.get("logits_to_keep")) and live.loss_function is ForCausalLMLoss


def _keeps_some(keep):
    return keep is not None and not (isinstance(keep, int) and keep == 0)


def _handed(tree):
    if tree.kind == "input":
        yield tree.value
    for child in tree.children:
        yield from _handed(child)
