"""A live model on disk: its spec, and every tensor that differs from the base.

    folder/spec.json             the spec, as text
    folder/adapter.safetensors   new tensors, trained or merged base tensors, changed buffers; in its metadata the spec once more, the
                                 base's fingerprint, and dtype, shape and hash of every tensor

Loading re-runs the passes on the base and puts the tensors in. Everything is checked before anything is handed back.
"""

import json
import os
import secrets
import shutil
import stat
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from ..errors import Refused, SpecError
from ..spec.parse import Spec
from .fingerprint import Fact, Fingerprint, dtype_name, facts, fingerprint, stored_tensors

SPEC, ADAPTER = "spec.json", "adapter.safetensors"
FORMAT = 1
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


# -- save ----------------------------------------------------------------------------------------------------------------------------


def save(live, folder, format="rewrite", *, whole=False):
    """Write the live model's spec and what differs from its base to `folder`, and return the folder's path.

    What passes derived from the base (a quantised weight's codes) is left out, its hash is kept, and loading makes it anew; with `whole` it is
    stored as well. format: "peft" writes what Hugging Face's PEFT loads instead, for the methods that it has. The folder appears, or replaces
    an earlier one of its kind, only when it is complete. Raises Refused for a model that did not come from `rewrite`, values that are NaN or infinite,
    a folder that holds anything else, or one that cannot be written, and for what PEFT cannot say.
    """
    if format not in ("rewrite", "peft"):
        raise Refused(f'save: there is no format {format!r}. Formats: "rewrite", "peft".')
    live = unwrapped(live)
    folder = Path(folder)
    dtype, tensors = _differing(live)
    same = {name: fact for name, fact in facts({name: t for name, t in tensors.items() if live.report.derived.get(name)}).items() if fact == live.report.derived[name]}
    if not whole:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in same}
    _refuse_not_finite(tensors, "was not saved: did the training diverge?")
    if format == "peft":
        from ..peft.write import files

        _replace(folder, files(live, tensors))
        return folder
    known = live.__dict__.get("_adapters")
    if known is not None and set(known.steps) != set(known.active):
        idle = ", ".join(sorted(set(known.steps) - set(known.active)))
        raise Refused(f"save: adapters that are not in use ({idle}) would be left out. Use adapters(live).save(folder) for each in a folder of its own, or use or delete them first.")
    return _written(live, folder, live.spec, tensors, dtype, same)


def write(live, folder, spec, tensors):
    """Write some tensors of a live model as if `spec` had made them: what `load` reads on the same base."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    _refuse_not_finite(tensors, "was not saved: did the training diverge?")
    return _written(live, folder, spec, tensors, None, {})


def read_folder(folder, base):
    """(spec, name → tensor) of a folder that was saved on this base (a Fingerprint). Raises Refused where it was saved on another."""
    _refuse_not_ours(folder)
    record = _read_record(folder / ADAPTER)
    wrong = record["base"].differences(base)
    if wrong:
        raise Refused(f"{folder}: was saved on another base: {wrong[0]}. Load the base that it was trained on.")
    return _read_spec(folder / SPEC, record, ()), _read_tensors(folder / ADAPTER, record)


def put_tensors(own, tensors, path):
    """Write tensors that were read from `path` into those of a live model, name by name. Raises Refused where they are not the same ones."""
    _refuse_names(path, tensors.keys(), own.keys(), own.keys())
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise Refused(f"{path}: {name} is {tuple(tensor.shape)}; here it is {tuple(own[name].shape)}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _written(live, folder, spec, tensors, dtype, derived):
    record = {
        "format": FORMAT,
        "spec": spec.to_dict(full=True),
        "dtype": dtype,
        "base": live._base.to_dict(),
        "derived": {name: fact.to_list() for name, fact in derived.items()},
        "tensors": {name: fact.to_list() for name, fact in facts(tensors).items()},
    }
    content = safetensors.torch.save(tensors, {"rewrite": json.dumps(record, ensure_ascii=False, separators=(",", ":"))})
    _replace(folder, {SPEC: spec.to_json().encode(), ADAPTER: content})
    return folder


def unwrapped(live, word="save"):
    """The live model itself, out of torch.compile's or DistributedDataParallel's wrapper. Refused, by `word`, for what did not come from rewrite."""
    while "_base" not in vars(live):
        inner = live._modules.get("_orig_mod") or live._modules.get("module")
        if inner is None:
            raise Refused(f"{word}: this {type(live).__name__} did not come from rewrite(). Give what rewrite or load handed back.")
        live = inner
    return live


def _differing(live):
    """What is to be stored: (the dtype that the whole model was cast to, or None; name → tensor on the CPU, tied ones once)."""
    tensors, base = stored_tensors(live), live._base
    known = base.facts()
    cast = _cast(tensors, known)
    changed = base.changed({name: t for name, t in tensors.items() if name in known}, known, cast)
    kept, seen, storages = {}, set(), set()
    for name in sorted(tensors):
        tensor = tensors[name]
        if (name in known and name not in changed) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        kept[name] = value.clone() if storage in storages else value  # two views of one storage: safetensors writes neither as a view
        storages.add(storage)
    return str(cast).removeprefix("torch.") if cast else None, kept


def _cast(tensors, known):
    """The one floating dtype that all tensors have now, where the base's had others (`live.to(torch.bfloat16)`), else None."""
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    before = {known[name].dtype for name, t in tensors.items() if name in known and t.is_floating_point()}
    if len(dtypes) != 1 or before <= {str(dtype).removeprefix("torch.") for dtype in dtypes}:
        return None
    return dtypes.pop()


def _refuse_not_finite(tensors, consequence):
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            if bad:
                raise Refused(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite. The model {consequence}")


def refuse_unwritable(folder):
    """Raises Refused where `save` could not write to `folder`, so that the work before it need not be done in vain."""
    folder = Path(folder)
    place = next((p for p in (folder, *folder.parents) if os.path.lexists(p)), folder)
    _refuse_foreign(folder)
    if not place.is_dir() or not os.access(place if place != folder else folder.parent, os.W_OK):
        reason = "may not be written to" if place.is_dir() else "is not a folder"
        raise Refused(f"{folder}: cannot be written: {place} {reason}. Choose another folder. Nothing was written.")


def _replace(folder, files):
    """Write a folder of files beside `folder`, then put it in its place."""
    folder = Path(os.path.abspath(folder))
    _refuse_foreign(folder, tuple(files))
    token = secrets.token_hex(4)
    fresh, old = (folder.with_name(f".{folder.name}.{word}-{token}") for word in ("new", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        for name, content in files.items():
            with open(fresh / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
            try:
                fresh.rename(folder)
            except BaseException:  # an interrupt too: the earlier folder comes back whatever happened
                old.rename(folder)
                raise
        else:
            fresh.rename(folder)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Refused(f"{folder}: cannot be written: {reason}. Choose another folder. Nothing was written.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_foreign(folder, own=(SPEC, ADAPTER)):
    """Only a folder that is not there, is empty, or holds what `save` writes (`own`) and nothing else, may be replaced."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise Refused(f"{folder}: is a {'link' if folder.is_symlink() else 'file'}, not a folder. Choose another place. Nothing was written.")
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise Refused(f"{folder}: cannot be read: {error.strerror}. Choose another folder. Nothing was written.") from error
    other = [name for name in names if name not in own]
    if other or (names and names != sorted(own)):
        what = ", ".join((other or names)[:3]) + (" …" if len(other or names) > 3 else "")
        raise Refused(f"{folder}: holds other files ({what}), which saving would replace. Choose a new folder. Nothing was written.")
    if names and ADAPTER in own:
        try:
            _read_record(folder / ADAPTER)
        except Refused as error:
            raise Refused(f"{folder}: holds files that save() did not write. Choose a new folder. Nothing was written. ({error})") from error


# -- load ----------------------------------------------------------------------------------------------------------------------------


def load(model, folder, passes=(), example=None):
    """The live model that was saved in `folder`, on the base `model` (which is not changed). A folder of PEFT's is read too.

    passes: `Pass` classes of your own that the folder's spec may name; nothing that it names is imported. example: as for `rewrite`.
    Raises Refused for another base than the one saved with, and for a folder that is incomplete, damaged, or not of this kind; SpecError
    for a spec in it that is wrong. The model is handed back complete or not at all.
    """
    from ..pipeline import rewrite_again  # the pipeline takes fingerprints, this needs the pipeline

    folder = Path(folder)
    if os.path.lexists(folder / "adapter_config.json"):
        from ..peft.read import read

        return read(model, folder, example)
    _refuse_not_ours(folder)
    record = _read_record(folder / ADAPTER)
    spec = _read_spec(folder / SPEC, record, passes)
    wrong = record["base"].differences(fingerprint(model))
    if wrong:
        shown = "\n".join(f"  {line}" for line in wrong[:5]) + (f"\n  … and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise Refused(f"{folder}: was saved on another base. {len(wrong)} difference{'s' if len(wrong) > 1 else ''}:\n{shown}\nLoad the base that it was trained on.")
    tensors = _read_tensors(folder / ADAPTER, record)
    live = rewrite_again(model, spec, tensors, example)
    _refuse_other_values(live, record, tensors, folder / ADAPTER)
    if record["dtype"]:
        live.to(getattr(torch, record["dtype"]))
    _put(live, tensors, record["derived"], folder / ADAPTER)
    return live


def _refuse_other_values(live, record, tensors, path):
    """What the passes derived from the base anew must be, bit for bit, what they derived when the model was saved."""
    for name, fact in record["derived"].items():
        found = live.report.derived.get(name)
        reason = "is not made by this spec on this base" if found is None else fact.difference(found)
        if reason and name not in tensors:
            raise Refused(f"{path}: {name} {reason}: it was not stored, and comes out otherwise here. Save it where it was made with save(live, folder, whole=True).")


def _refuse_not_ours(folder):
    if not folder.is_dir():
        raise Refused(f"{folder}: {'is not a folder' if os.path.lexists(folder) else 'is not there'}. Give the folder that save() wrote.")
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise Refused(f"{folder}: cannot be read: {error.strerror}") from error
    pickles = [name for name in names if name.endswith(PICKLES)]
    for name in (SPEC, ADAPTER):
        if name not in names and pickles:
            raise Refused(f"{folder}: {name} is missing; {pickles[0]} is a pickle, which can run code and is never read. Save anew with save().")
        if name not in names:
            raise Refused(f"{folder}: {name} is missing. Give a folder that save() wrote: it holds {SPEC} and {ADAPTER}.")
        if not stat.S_ISREG(os.lstat(folder / name).st_mode):
            raise Refused(f"{folder / name}: is not a plain file. What a link points to is not read: copy the file itself into the folder.")


def _read_record(path):
    """The metadata of an adapter file, its `base` as a Fingerprint and its `tensors` as Facts."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise Refused(f"{path}: {_damage(path, error)}") from error
    if "rewrite" not in metadata:
        raise Refused(f"{path}: a safetensors file, but not one that save() wrote: no record of base and spec. Save the model anew with save().")
    try:
        record = json.loads(metadata["rewrite"])
        if record["format"] != FORMAT:
            raise Refused(f"{path}: of format {record['format']!r}; this version reads {FORMAT}. Use the version of rewrite that wrote it.")
        record["base"] = Fingerprint.from_dict(record["base"])
        record["tensors"] = {name: Fact.from_list(fact) for name, fact in record["tensors"].items()}
        record["derived"] = {name: Fact.from_list(fact) for name, fact in record.get("derived", {}).items()}
        if record["dtype"] is not None and not isinstance(getattr(torch, record["dtype"]), torch.dtype):
            raise ValueError(f"{record['dtype']!r} is not a dtype")
        if not isinstance(record["spec"], dict):
            raise TypeError("its spec is not an object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{path}: its record of base and spec is damaged ({type(error).__name__}: {error}). Save anew with save().") from error
    _refuse_names(path, names, record["tensors"].keys(), record["tensors"].keys())
    return record


def _damage(path, error):
    """Why a file is no safetensors file, in words."""
    try:
        with open(path, "rb") as file:
            start, size = file.read(8), os.fstat(file.fileno()).st_size
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "is a pickle, which can run code and is never read. Save the model anew with save()."
    return f"truncated or damaged ({size} bytes; {error}). Copy it again, or save the model anew."


def _read_spec(path, record, passes):
    """The spec of the folder, which must be the one that the adapter was saved with. Only built-in passes and `passes` may be named."""
    spec = Spec.parse(path, passes, imports=False)
    try:
        saved = Spec.parse(record["spec"], passes, imports=False)
    except SpecError as error:
        raise Refused(f"{path.with_name(ADAPTER)}: was saved with a spec that is not valid here: {error}") from error
    if spec != saved:
        change = _first_difference(saved.to_dict(full=True), spec.to_dict(full=True), "")
        raise Refused(f"{path}: not the spec that {ADAPTER} was saved with: {change}. Put the old one back, or rewrite and train anew.")
    return spec


def _first_difference(old, new, place):
    if type(old) is type(new) is dict:
        for key in old | new:
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{place}.{key}" if place else key)
    if type(old) is type(new) is list:
        if len(old) != len(new):
            return f"{place} had {len(old)} items, has {len(new)}"
        for i, (a, b) in enumerate(zip(old, new)):
            if a != b:
                return _first_difference(a, b, f"{place}[{i}]")
    shown = ["nothing" if value is None else json.dumps(value, ensure_ascii=False) for value in (old, new)]
    return f"{place} was {shown[0]}, is {shown[1]}"


def _read_tensors(path, record):
    """name → tensor, each as the record says, every value finite."""
    tensors = {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            for name in record["tensors"]:
                tensors[name] = file.get_tensor(name).clone()  # aligned as torch does it: sums round otherwise elsewhere; and no longer a part of the file
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise Refused(f"{path}: {_damage(path, error)}") from error
    for name, fact in facts(tensors).items():
        reason = record["tensors"][name].difference(fact)
        if reason:
            raise Refused(f"{path}: {name} {reason}: the file was changed or damaged. Copy it again, or save the model anew.")
    _refuse_not_finite(tensors, f"in {path} was not loaded: take an earlier one.")
    return tensors


def _refuse_names(path, found, wanted, allowed):
    foreign, missing = sorted(found - allowed), sorted(wanted - found)
    parts = []
    for word, names in (("foreign", foreign), ("missing", missing)):
        if names:
            parts.append(f"{len(names)} {word} ({', '.join(names[:3])}{' …' if len(names) > 3 else ''})")
    if parts:
        raise Refused(f"{path}: not the tensors of this spec on this base: {' and '.join(parts)}. Save the model anew with save().")


def _put(live, tensors, derived, path):
    """Put the tensors into the live model, in place of its own; never into storage that it shares with the base."""
    own = stored_tensors(live)
    covered = {id(own[name]) for name in tensors if name in own}
    new = {name for name, tensor in own.items() if name not in live._base.names and name not in derived and name not in live.report.memory and id(tensor) not in covered}
    _refuse_names(path, tensors.keys(), new | (tensors.keys() & own.keys()), own.keys())
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise Refused(f"{path}: {name} is {tuple(tensor.shape)}; this spec makes {tuple(own[name].shape)} on this base.")
        if tensor.dtype != own[name].dtype and not (tensor.is_floating_point() and own[name].is_floating_point()):
            raise Refused(f"{path}: {name} is {dtype_name(tensor)}; this spec makes {dtype_name(own[name])} on this base.")
    for name, tensor in tensors.items():
        tensor = tensor.to(own[name].device)
        if isinstance(own[name], torch.nn.Parameter):
            own[name].data = tensor  # also under its other names, where it is tied
            continue
        parent, _, leaf = name.rpartition(".")
        live.get_submodule(parent)._buffers[leaf] = tensor
