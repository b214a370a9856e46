"""Classification's loss and counts, evaluation over ranks, and averaged buffers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hetero_kt import data, models
from hetero_kt.config import Data
from hetero_kt.data import ImageSet, Loader
from hetero_kt.evaluate import averaged_buffers
from hetero_kt.tasks import classification
from hetero_kt.tasks.classification import evaluate


class Fixed(nn.Module):
    """Answers what is written in the picture: class K's logit is the K-th pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        return x[:, 0].flatten(1)


def reference(images: ImageSet) -> dict[str, float]:
    logits = images.images[..., 0].flatten(1).double()
    ranks = logits.argsort(dim=1, descending=True, stable=True)
    hits = ranks == images.labels[:, None]
    return {
        "loss": nn.functional.cross_entropy(logits, images.labels).item(),
        "top1": 100 * hits[:, 0].double().mean().item(),
        "top5": 100 * hits[:, :5].any(1).double().mean().item(),
    }


def scored(size: int) -> ImageSet:
    """Pictures whose red pixels are nine different logits, so that no rank depends on how ties break."""
    generator = torch.Generator().manual_seed(size)
    order = torch.rand(size, 9, generator=generator).argsort(1)
    pixels = (order * 2).to(torch.uint8).view(size, 3, 3, 1).expand(-1, -1, -1, 3).contiguous()
    labels = torch.randint(9, (size,), generator=generator)
    return ImageSet(pixels, labels, 9, (0.0,) * 3, (1 / 255,) * 3, "scored")


@pytest.mark.parametrize("size", [1, 7, 256, 600])
def test_evaluate_equals_the_definition(size):
    images = scored(size)
    found = evaluate(Fixed(), Loader(images, 1, 0, ()), "cpu")
    assert found == pytest.approx(reference(images), rel=1e-5)


def shares(size: int, world: int) -> tuple[torch.Tensor, list[int]]:
    total, forwards = torch.zeros(classification.COUNTS, dtype=torch.float64), []
    for rank in range(world):
        model = Fixed()
        for x, y, weight in Loader(scored(size), world, 0, (), rank, world).eval_batches(5):
            total += classification.count(model(x), y, weight)
        forwards.append(model.forwards)
    return total, forwards


@pytest.mark.parametrize(("size", "world"), [(11, 2), (12, 5), (3, 4), (40, 3)])
def test_shares_add_up_for_sizes_that_do_not_divide(size, world):
    total, forwards = shares(size, world)
    assert total[3] == size
    assert classification.metrics(total) == pytest.approx(reference(scored(size)), rel=1e-5)
    assert len(set(forwards)) == 1


def on_a_rank(size: int) -> tuple[dict[str, float], bool]:
    rank, world = dist.get_rank(), dist.get_world_size()
    return evaluate(Fixed(), Loader(scored(size), world, 0, (), rank, world), "cpu"), dist.is_initialized()


def buffers_on_a_rank() -> dict[str, object]:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for _ in range(rank + 1):
        model(torch.randn(8, 3, 5, 5))
    model.register_buffer("empty", torch.zeros(0))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with averaged_buffers(model):
        inside = {name: buffer.clone() for name, buffer in model.named_buffers()}
    restored = all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    failed = False
    try:
        with averaged_buffers(model):
            raise KeyError
    except KeyError:
        failed = all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    return {"before": before, "inside": inside, "restored": restored, "restored after an error": failed}


def test_two_ranks_agree_and_count_once(ranks):
    for size in (9, 10):
        for found, distributed in ranks(2).run(on_a_rank, size):
            assert distributed
            assert found == pytest.approx(reference(scored(size)), rel=1e-5)


def test_averaged_buffers_are_means_and_are_restored(ranks):
    first, second = ranks(2).run(buffers_on_a_rank)
    for rank in (first, second):
        assert rank["restored"]
        assert rank["restored after an error"]
        for name in ("1.running_mean", "1.running_var"):
            mean = (first["before"][name].double() + second["before"][name].double()) / 2
            assert torch.equal(rank["inside"][name], mean.float())
        assert torch.equal(rank["inside"]["1.num_batches_tracked"], rank["before"]["1.num_batches_tracked"])
    assert not torch.equal(first["before"]["1.running_mean"], second["before"]["1.running_mean"])


def test_one_rank_keeps_its_buffers():
    model = nn.BatchNorm1d(3)
    model(torch.randn(4, 3))
    before = model.running_mean.clone()
    with averaged_buffers(model):
        assert torch.equal(model.running_mean, before)


def test_evaluate_restores_each_modules_mode_and_changes_nothing():
    model = models.build("cifar:mobilenetv2_tiny", 100)
    model.train()
    model.blocks[0].eval()  # a part that its owner froze
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loader = Loader(data.load(Data(name="generated"), train=False), 8, 0, ())
    found = evaluate(model, loader, "cpu")
    assert set(found) == {"loss", "top1", "top5"}
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())

    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError

    broken = Broken()
    with pytest.raises(RuntimeError):
        evaluate(broken, loader, "cpu")
    assert broken.training


def test_loss_is_cross_entropy_in_float32():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).bfloat16()
    x, y = torch.randn(6, 3, 2, 2), torch.randint(5, (6,))
    loss = classification.loss(model, (x, y))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(x.bfloat16()).float(), y))
    loss.backward()
    assert model[1].weight.grad is not None


def test_counts_ignore_fillers_and_few_classes_rank_all():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [float("nan"), float("nan")]])
    counts = classification.count(logits, torch.tensor([0, 0, 0]), torch.tensor([1.0, 1.0, 0.0]))
    found = classification.metrics(counts)
    assert (found["top1"], found["top5"]) == (50.0, 100.0)
    expected = nn.functional.cross_entropy(logits[:2].double(), torch.tensor([0, 0])).item()
    assert found["loss"] == pytest.approx(expected)


def test_a_tiny_model_learns_the_generated_set():
    torch.manual_seed(0)
    model = models.build("cifar:resnet_tiny", 100)
    train, test = (data.load(Data(name="generated"), train=part) for part in (True, False))
    loader = Loader(train, 64, 0, ())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(2 * loader.steps_per_epoch):
        optimizer.zero_grad()
        classification.loss(model, loader.batch(step)).backward()
        optimizer.step()
    assert evaluate(model, Loader(test, 64, 0, ()), "cpu")["top5"] > 25  # chance is 5
