"""BERT and DistilBERT by name, from and to files, and in pieces over ranks."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from rounding import STILL, assert_close, movement, result_of
from safetensors.torch import load_file, save_file
from small import zero
from texts import tokenizer

from hetero_kt.models import bert
from hetero_kt.models.bert import _heads, build, outputs, save
from hetero_kt.tasks import masked_lm

VOCABULARY = 99
KINDS = ("bert", "distilbert")
TASKS = ("question_answering", "classification", "masked_lm")


def made(name: str, task: str = "question_answering", seed: int = 0, **options):
    torch.manual_seed(seed)
    return build(name, task, vocabulary=VOCABULARY, **options)


def batch(rows: int = 3, width: int = 16):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    types = torch.zeros_like(ids)
    types[:, 6:] = 1
    return ids, mask, types


def answers(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found = outputs(model, *batch())
    return torch.stack([found.start_logits, found.end_logits]) if "start_logits" in found else found.logits


# --- fresh models ---


@pytest.mark.parametrize(
    ("width", "heads"), [(768, 12), (256, 4), (32, 1), (64, 1), (100, 2), (96, 1), (192, 3), (1, 1), (67, 1), (160, 2)]
)
def test_heads_are_64_wide_or_nearly(width, heads):
    assert _heads(width) == heads
    assert width % heads == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_a_size_asked_for_by_name_is_built_with_transformers_own_names(kind, task):
    model, start = made(f"{kind}:2x32", task, classes=5)
    theirs = bert._MODELS[kind, task](model.config)
    assert type(model) is type(theirs)
    assert dict(model.state_dict()).keys() == dict(theirs.state_dict()).keys()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert set(start.fresh) | set(model.all_tied_weights_keys) == set(model.state_dict())
    assert not start.taken
    assert "are fresh" in str(start)
    assert answers(model).shape == {
        "question_answering": (2, 3, 16),
        "classification": (3, 5),
        "masked_lm": (3, 16, VOCABULARY),
    }.get(task)


def test_the_weight_of_the_papers_base_model_has_its_name_and_shape():
    with torch.device("meta"):
        config = bert._sized("bert:12x768", 30522)[1]
        model = transformers.BertForQuestionAnswering(config)
    assert model.get_parameter("bert.encoder.layer.11.attention.self.value.weight").shape == (768, 768)
    assert sum(p.numel() for p in model.parameters()) == 108_893_186  # as published
    assert config.to_dict().items() >= {"num_attention_heads": 12, "intermediate_size": 3072}.items()
    small = bert._sized("distilbert:6x768", 30522)[1]
    defaults = transformers.DistilBertConfig()
    assert {k: v for k, v in small.to_dict().items() if v != defaults.to_dict()[k]} == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_the_start_and_it_is_transformers_distribution(kind):
    """With a deviation of 0.02 at 768 features, and as much more as there are fewer, by the root."""
    one, other, third = (made(f"{kind}:2x64", "masked_lm", seed)[0] for seed in (0, 0, 1))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    theirs = bert._MODELS[kind, "masked_lm"](one.config).state_dict()
    different = 0
    for name, tensor in one.named_parameters():
        different += not torch.equal(tensor, third.get_parameter(name))
        assert tensor.mean().item() == pytest.approx(theirs[name].mean().item(), abs=1e-2), name
        if tensor.numel() > 1000:
            assert tensor.std().item() == pytest.approx(0.02 * 12**0.5, rel=0.1), name
        elif tensor.numel() > 1:
            assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.2, abs=1e-9), name
    assert different > 10
    assert not one.get_input_embeddings().weight[0].any()  # of padding


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_tied_and_stay_so(kind):
    model, _ = made(f"{kind}:1x32", "masked_lm")
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    assert inner.weight is outer.weight
    names = [name for name, _ in model.named_parameters()]
    assert not set(names) & {"cls.predictions.decoder.weight", "vocab_projector.weight"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = inner.weight.clone()
    ids, mask, types = batch()
    positions = torch.tensor([[1, 2], [3, 4], [5, 6]])
    masked_lm.loss(model, (ids, mask, types, positions, ids.gather(1, positions))).backward()
    optimizer.step()
    assert not torch.equal(inner.weight, before)
    assert inner.weight is outer.weight


# --- names and vocabularies that do not fit ---


@pytest.mark.parametrize(
    "name", ["bert:2", "bert:0x32", "bert:2x", "distilbert:2x32x4", "bert", "bert:", "roberta:2x32"]
)
def test_an_unknown_name_is_refused_with_an_example(name):
    with pytest.raises(ValueError, match=r"no model is called .* bert:4x256 for example"):
        made(name)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task 'qa' is unknown: use any of question_answering"):
        made("bert:1x32", "qa")


@pytest.mark.parametrize("name", ["hf:./none", "hf:/none/at/all", "hf:", "hf:a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("fetched"))
    with pytest.raises(ValueError, match="there is no folder"):
        made(name)


def test_a_hub_that_cannot_be_reached_is_an_error_and_never_random_weights(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Name or service not known\nRetry")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"could not be fetched from the hub \(Name or service not known\)") as caught:
        made("hf:bert-base-uncased")
    assert "\n" not in str(caught.value)


def test_another_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"is not that of a BERT or DistilBERT"):
        made(f"hf:{tmp_path}")


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    model, _ = made("bert:1x32")
    save(model, model.state_dict(), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"knows 99 tokens and the tokenizer has 5: name the model's own"):
        build(f"hf:{tmp_path / 'saved'}", "question_answering", vocabulary=5)


def test_a_tokenizer_gives_its_size(tmp_path):
    tokens = tokenizer(tmp_path)
    model, _ = build("distilbert:1x32", "masked_lm", vocabulary=tokens)
    assert model.config.vocab_size == tokens.size


# --- files ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_a_saved_folder_loads_with_equal_logits_in_transformers_and_here(tmp_path, kind, task):
    model, _ = made(f"{kind}:2x32", task, classes=3)
    state = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    for one, other in model.all_tied_weights_keys.items():
        state[one] = state[other]
    model.load_state_dict(state)
    save(model, state, tmp_path / "saved", tokenizer(tmp_path))
    theirs, report = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(answers(theirs), answers(model))
    auto = transformers.AutoModel.from_pretrained(tmp_path / "saved")
    assert auto.config.model_type == kind
    again, start = made(f"hf:{tmp_path / 'saved'}", task, classes=3, seed=5)
    assert not start.fresh
    assert not start.left
    assert torch.equal(answers(again), answers(model))
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")("good river king")["input_ids"]
    assert words == tokenizer(tmp_path).whole("good river king")["input_ids"]
    assert not list((tmp_path / "saved").glob("*.bin"))
    assert not list(tmp_path.glob("*.part"))


def test_saving_again_replaces_the_folder(tmp_path):
    for name in ("bert:2x32", "distilbert:1x32"):
        model, _ = made(name)
        save(model, model.state_dict(), tmp_path / "saved")
    assert type(transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "saved")) is type(model)


def test_a_state_that_is_not_the_models_is_not_saved(tmp_path):
    model, _ = made("bert:1x32")
    state = model.state_dict()
    for change, says in (
        ({**state, "adapter.weight": torch.zeros(2)}, "adapter.weight is unknown"),
        ({k: v for k, v in state.items() if k != "qa_outputs.bias"}, "qa_outputs.bias is missing"),
        ({**state, "qa_outputs.bias": torch.zeros(3)}, "qa_outputs.bias is 3, not 2"),
    ):
        with pytest.raises(ValueError, match=says):
            save(model, change, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_files_in_several_pieces_with_old_names_are_read(tmp_path):
    model, _ = made("bert:2x32", "masked_lm")
    save(model, model.state_dict(), tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    (tmp_path / "saved" / "model.safetensors").unlink()
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in tensors.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(512)[None]
    names = sorted(old)
    for n, part in enumerate((names[::2], names[1::2])):
        save_file({k: old[k] for k in part}, tmp_path / "saved" / f"model-0000{n}.safetensors")
    again, start = made(f"hf:{tmp_path / 'saved'}", "masked_lm", seed=3)
    assert torch.equal(answers(again), answers(model))
    assert not start.left


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["question_answering", "classification"])
def test_a_pretrained_body_starts_another_task(tmp_path, kind, task):
    source, _ = made(f"{kind}:2x32", "masked_lm")
    file = tmp_path / "export.safetensors"
    save_file({name: tensor.clone() for name, tensor in source.state_dict().items()}, file)
    model, start = made(f"{kind}:2x32", task, seed=7, init=str(file))
    fresh, _ = made(f"{kind}:2x32", task, seed=7)
    prefix = model.base_model_prefix
    for name, tensor in model.state_dict().items():
        if name.startswith(prefix) and "pooler" not in name:
            assert torch.equal(tensor, source.state_dict()[name])
            assert name in start.taken
        else:
            assert torch.equal(tensor, fresh.state_dict()[name])
            assert name in start.fresh
    assert set(start.taken) | set(start.fresh) == set(model.state_dict())
    assert all(not name.startswith(prefix) for name in start.left)
    assert start.left
    text = str(start)
    assert f"{len(start.taken)} tensors are from {file}" in text
    assert start.fresh[0] in text
    assert start.left[0] in text


def test_a_head_is_taken_whole_or_not_at_all(tmp_path):
    source, _ = made("distilbert:1x32", "classification", classes=3)
    save(source, source.state_dict(), tmp_path / "saved")
    same, start = made("distilbert:1x32", "classification", classes=3, seed=1, init=str(tmp_path / "saved"))
    assert not start.fresh
    assert torch.equal(same.classifier.weight, source.classifier.weight)
    other, start = made("distilbert:1x32", "classification", classes=4, seed=1, init=str(tmp_path / "saved"))
    assert "pre_classifier.weight" in start.fresh
    assert not torch.equal(other.pre_classifier.weight, source.pre_classifier.weight)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bert:1x32", "bert.encoder.layer.1.attention.output.LayerNorm.bias is unknown"),
        ("bert:3x32", "is missing"),
        ("bert:2x64", "is 99x32, not 99x64"),
        ("distilbert:2x32", "distilbert.embeddings.word_embeddings.weight is missing"),
    ],
)
def test_another_models_file_is_refused_in_one_sentence(tmp_path, name, says):
    source, _ = made("bert:2x32", "masked_lm")
    save(source, source.state_dict(), tmp_path / "saved")
    with pytest.raises(ValueError, match=says) as caught:
        made(name, init=str(tmp_path / "saved"))
    assert "another model's" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no weights"):
        made("bert:1x32", init=str(tmp_path))
    with pytest.raises(ValueError, match="holds no weights"):
        made("bert:1x32", init=str(tmp_path / "none.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        made("bert:1x32", init=str(tmp_path / "bad.safetensors"))
    with pytest.raises(ValueError, match="both say where to start"):
        made(f"hf:{tmp_path}", init=str(tmp_path / "bad.safetensors"))


# --- masked language modelling ---


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_positions_are_those_of_the_whole_row(kind):
    model, _ = made(f"{kind}:2x32", "masked_lm")
    model.eval()
    ids, mask, types = batch()
    positions = torch.tensor([[0, 3, 9], [15, 2, 2], [7, 8, 1]])
    with torch.no_grad():
        chosen = masked_lm.logits(model, ids, mask, types, positions)
        whole = outputs(model, ids, mask, types).logits
    expected = torch.stack([whole[row, places] for row, places in enumerate(positions)])
    assert torch.allclose(chosen, expected, atol=1e-6)
    labels = torch.full_like(ids, -100)
    labels[1, 15], labels[2, 7] = 4, 9
    theirs = outputs(model, ids, mask, types, labels=labels).loss
    ours = masked_lm.loss(
        model, (ids, mask, types, positions, torch.tensor([[-100] * 3, [4, -100, -100], [9, -100, -100]]))
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_token_types_reach_bert_and_padding_reaches_nobody(kind):
    model, _ = made(f"{kind}:1x32", "classification")
    model.eval()
    ids, mask, types = batch()
    with torch.no_grad():
        plain = outputs(model, ids, mask, types).logits
        other_types = outputs(model, ids, mask, 1 - types).logits
        ids = ids.clone()
        ids[0, 10:] = 7
        other_padding = outputs(model, ids, mask, types).logits
    assert torch.allclose(plain, other_types) == (kind == "distilbert")
    assert torch.allclose(plain, other_padding, atol=1e-6)


# --- in pieces over ranks ---


def whole_tensors(model) -> dict[str, torch.Tensor]:
    import deepspeed

    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def in_pieces(kind: str, task: str, init: str):
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    model, start = made(f"{kind}:2x32", task, init=init, zero=zero(3))
    assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE and p.numel() == 0 for p in model.parameters())
    return {name: tensor.numpy() for name, tensor in whole_tensors(model).items()}, start


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_built_in_pieces_is_the_one_built_whole(ranks, tmp_path, kind):
    whole, _ = made(f"{kind}:2x32", "masked_lm")
    save(whole, whole.state_dict(), tmp_path / "saved")
    for task, init in (("masked_lm", ""), ("question_answering", str(tmp_path / "saved"))):
        expected, start = made(f"{kind}:2x32", task, init=init)
        for found, their_start in ranks(2).run(in_pieces, kind, task, init):
            assert their_start == start
            assert found.keys() == dict(expected.named_parameters()).keys()
            for name, parameter in expected.named_parameters():
                assert torch.equal(torch.from_numpy(found[name]), parameter.detach()), name


def trained(kind: str, stage: int, steps: int = 3):
    import torch.distributed as dist

    from hetero_kt.config import Optim
    from hetero_kt.distributed import params
    from hetero_kt.distributed.engine import build_engine

    rank, world = dist.get_rank(), dist.get_world_size()
    model, _ = made(f"{kind}:2x32", "masked_lm", zero=zero(3) if stage == 3 else None)
    model.eval()  # no dropout
    sgd = Optim("sgd", lr=0.1, momentum=0.9, weight_decay=1e-3)
    engine = build_engine(model, optim=sgd, zero=zero(stage), precision="fp32", micro_batch=2, accumulation=1)
    engine.eval()
    for step in range(steps):
        loss = masked_lm.loss(engine, tuple(tensor[rank::world] for tensor in masked_batch(step)))
        engine.backward(loss)
        engine.step()
    state = params.state_dict(engine)
    engine.destroy()
    return {name: tensor.numpy() for name, tensor in state.items()}


def masked_batch(step: int):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, VOCABULARY, (4, 16), generator=generator)
    positions = torch.randint(0, 16, (4, 3), generator=generator)
    labels = torch.randint(5, VOCABULARY, (4, 3), generator=generator)
    return ids, torch.ones_like(ids), torch.zeros_like(ids), positions, labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [2, 3])
def test_tied_embeddings_train_over_ranks_as_in_one_process(ranks, tmp_path, kind, stage):
    theirs = result_of(reference, kind)
    first, _ = ranks(2).run(trained, kind, stage)
    model = trained_plainly(kind, STILL)
    save(model, {name: torch.from_numpy(values) for name, values in first.items()}, Path(tmp_path) / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    ours = {"weights": {name: first[name] for name in theirs["weights"]}, "answers": answers(again)}
    assert_close(ours, theirs, movement(reference, kind))


def reference(kind, nudge):
    model = trained_plainly(kind, nudge)
    return {"weights": {name: p.detach() for name, p in model.named_parameters()}, "answers": answers(model)}


def trained_plainly(kind, nudge):
    model, _ = made(f"{kind}:2x32", "masked_lm")
    model.eval()
    nudge.modules([model])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(3):
        masked_lm.loss(model, masked_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def peak_megabytes(in_pieces: bool, init: str) -> float:
    """By how much this process grows at most while a model of 73 MB is built."""
    import gc

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    made("bert:1x32", zero=zero(3) if in_pieces else None)  # what is imported does not count
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)  # nor does what earlier tests have left free
    libc.mallopt(-3, 1 << 16)  # tensors in pages of their own, that go back when they are freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    model, _ = made("bert:24x256", init=init, zero=zero(3) if in_pieces else None)
    grown = (status("VmHWM") - before) / 1024
    del model
    gc.collect()
    return grown


def test_a_model_built_in_pieces_is_never_whole_on_a_rank(ranks, tmp_path):
    whole, _ = made("bert:24x256")
    save(whole, whole.state_dict(), tmp_path / "saved")
    size = sum(parameter.numel() * 4 for parameter in whole.parameters()) / 2**20
    assert size > 72
    for init in ("", str(tmp_path / "saved")):
        for grown in ranks(2).run(peak_megabytes, False, init):
            assert grown > 0.95 * size
        for grown in ranks(2).run(peak_megabytes, True, init):
            assert grown < 0.65 * size  # its half of all tensors, and one of them whole
