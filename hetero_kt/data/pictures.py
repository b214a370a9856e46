"""Batches of pictures that are decoded and augmented one by one, by timm's own transforms, in worker processes.

Shape suffix: B rows of this rank.
"""

from __future__ import annotations

import io
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import Normalize

from hetero_kt.config import Transform
from hetero_kt.data import counter
from hetero_kt.data.images import ImageSet
from hetero_kt.data.loader import fingerprint, turns
from hetero_kt.data.mixing import Mixer
from hetero_kt.data.order import Order
from hetero_kt.data.workers import Lost, Stream, usable

_AUGMENT, _REPLACE = 3, 4
_REPLACEMENTS = 32  # samples tried in a damaged one's place before the set counts as lost
_FORMATS = ("JPEG", "PNG", "WEBP")
MOST_BYTES = 2**28
"""Of an encoded picture."""
MOST_PIXELS = 2**26
"""Of a picture: decoding takes about eight bytes for each."""
_AGAIN = (
    "see whether its files are still there and whole, and start the same command again, which goes on from the last "
    "complete checkpoint"
)


class Unreadable(ValueError):
    """Damage that ends the run: met by one rank in the middle of an epoch, while the others go on."""


class Damaged(Exception):
    """A sample that cannot be read, and why, without a full stop."""


class _TooLarge(Exception):
    pass


def decoded(content: bytes, name: str) -> Image.Image:
    """A picture in RGB from a JPEG, PNG or WebP file's bytes; `name` is what messages call it. Raises Damaged."""
    with _decoding(name):
        picture = _opened(content)
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def upright(content: bytes, name: str) -> Image.Image:
    """As `decoded`, turned as its EXIF data says. Raises Damaged."""
    with _decoding(name):
        return ImageOps.exif_transpose(_opened(content)).convert("RGB")


def _opened(content: bytes) -> Image.Image:
    """The one place where a picture is opened. Other formats are not tried: for some, Pillow starts other programs."""
    if len(content) > MOST_BYTES:
        raise _TooLarge(f"{len(content):,} bytes, more than {MOST_BYTES:,}")
    picture = Image.open(io.BytesIO(content), formats=_FORMATS)
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise _TooLarge(f"{width:,} x {height:,} pixels, more than {MOST_PIXELS:,} in all")
    return picture


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged picture can raise anything
        reason = str(error) if isinstance(error, _TooLarge) else type(error).__name__
        if isinstance(error, Image.DecompressionBombError):
            reason = f"more than {MOST_PIXELS:,} pixels"
        raise Damaged(f"{name} cannot be decoded ({reason})") from error


class Statistics(Protocol):
    """Mean and deviation of a set's channels, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Source(Statistics, Protocol):
    """Labelled pictures, read one at a time and from any process."""

    name: str
    labels: np.ndarray
    """(S,), int64."""
    classes: int

    def picture(self, sample: int) -> Image.Image:
        """One sample in RGB. Raises Damaged."""

    def place(self, sample: int) -> str:
        """The file that holds the sample, as messages name it."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells this set from another."""

    def notices(self) -> list[str]:
        """What was left out when the set was opened."""


class InMemory:
    """An `ImageSet` as a source; its pictures keep their size."""

    def __init__(self, images: ImageSet) -> None:
        self.name, self.classes, self.mean, self.std = images.name, images.classes, images.mean, images.std
        # On the way to a worker a tensor's memory moves into shared memory, and a view by numpy would be left behind.
        self.labels = images.labels.numpy().copy()
        self._images = images.images
        self._fingerprint = fingerprint(images)

    def picture(self, sample: int) -> Image.Image:
        return Image.fromarray(self._images[sample].numpy())

    def place(self, sample: int) -> str:
        return self.name

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint

    def notices(self) -> list[str]:
        return []


class PictureLoader:
    """One rank's share of the global batches of a source, in the order of `Order`, each picture transformed by timm.

    What happens to a sample is decided by (seed, epoch, sample): ranks, batches and workers do not matter. The
    position is the step alone: any step may be asked for, and consecutive ones are prepared ahead.
    """

    def __init__(
        self,
        source: Source,
        batch: int,
        seed: int,
        transform: Transform,
        image_size: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        *,
        workers: int = 0,
        corrupt: Literal["skip", "stop"] = "skip",
        mixer: Mixer | None = None,
        augmentations: int = 0,
    ) -> None:
        """`batch` counts the rows of all ranks together; `workers` are this rank's processes, 0 decodes in the step;
        with a `mixer`, labels are soft; `augmentations` as for `Loader`.

        Raises:
            ValueError: an empty set, a batch that does not divide over the ranks, a transform that timm refuses.
        """
        if workers < 0:
            raise ValueError(f"--data.NAME.workers {workers} is no number of processes: use 0 or more")
        self.order = Order(source.name, len(source.labels), batch, seed, rank, world)
        self.samples, self.classes, self.name = len(source.labels), source.classes, source.name
        self.mean, self.std = source.mean, source.std
        self.labels = torch.from_numpy(source.labels)
        """The class of every sample, (S,)."""
        self.global_batch, self.steps_per_epoch = batch, self.order.steps_per_epoch
        self.device = torch.device(device)
        self._source, self._corrupt, self._mixer = source, corrupt, mixer
        self._image_size, self._workers, self.augmentations = image_size, workers, augmentations
        augmented, plain = (_Transformed(transform, image_size, source, training) for training in (True, False))
        self._train = Decoding(source, augmented, image_size, seed, replacing=True)
        self._eval = Decoding(source, plain, image_size, seed, replacing=False)
        self._stream: Stream | None = None
        self._bad: dict[int, str] = {}
        self._deaths = 0
        self._busy, self._decoded, self._waited, self._steps = 0.0, 0, 0.0, 0

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's rows of the global batch of `step`: pictures (B, C, H, W) and labels (B,), or (B, K) where mixed.

        Pictures are float32, normalised by the set's mean and deviation, channels last in memory. A sample that
        cannot be read is replaced by another one.

        Raises:
            ValueError: a damaged sample, where those are to end the run, or no sound one to replace it.
        """
        pictures, labels = self.draw(step)
        labels = self._move(labels)
        return self._mixer(pictures, labels, step) if self._mixer else (pictures, labels)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """As `batch`, but nothing is mixed, and the labels (B,) stay in the host's memory: for what is looked up by
        them there."""
        started = time.perf_counter()
        if self._stream is None or self._stream.position != step:
            self.close()
            self._stream = self._ahead(step)
        with self._alive():
            drawn: Batch = next(self._stream)
        self._waited += time.perf_counter() - started
        self._steps += 1
        self._note(drawn)
        return self._move(drawn.pictures), drawn.labels

    def eval_batches(self, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's share of every sample exactly once, not augmented: pictures, labels and weights (B,).

        Every rank yields equally many batches of equal size, at most `batch` rows each; rows that fill up, and
        samples that cannot be read, have weight 0, all others 1.

        Raises:
            ValueError: a damaged sample, where those are to end the run.
        """
        rows = list(self.order.in_turn(batch))
        stream = self._open(self._eval, lambda k: Task(rows[k][0], None), 0, len(rows), len(rows[0][0]))
        wanted = sound = 0
        reason = ""
        try:
            for samples_B, counts_B in rows:
                with self._alive():
                    drawn: Batch = next(stream)
                self._note(drawn)
                sound_B = ~np.isin(samples_B, [sample for sample, _ in drawn.bad])
                wanted, sound = wanted + int(counts_B.sum()), sound + int((counts_B & sound_B).sum())
                reason = reason or (drawn.bad[0][1] if drawn.bad else "")
                weight_B = torch.from_numpy(counts_B & sound_B).float()
                yield self._move(drawn.pictures), self._move(drawn.labels), self._move(weight_B)
            if wanted and not sound:
                raise Unreadable(f"{self.name}: not one sample can be read any more ({reason}): {_AGAIN}.")
        finally:
            stream.close()

    def fingerprint(self) -> dict[str, Any]:
        """What tells this set from another."""
        return self._source.fingerprint()

    def notices(self) -> list[str]:
        """What was left out on this rank since the start, by file, and how often workers were lost; a sentence each."""
        damaged: dict[str, dict[str, None]] = defaultdict(dict)  # by reason: several samples may show one picture
        for sample, reason in sorted(self._bad.items()):
            damaged[self._source.place(sample)][reason] = None
        texts = [
            f"{place}: {len(reasons)} damaged picture{'s' * (len(reasons) > 1)} left out ({_shortened(list(reasons))})."
            for place, reasons in damaged.items()
        ]
        deaths = self._deaths + (self._stream.restarts if self._stream else 0)
        lost = [f"{self.name}: the worker processes were killed and started again {deaths} times."] if deaths else []
        return self._source.notices() + texts + lost

    def throughput(self) -> dict[str, float]:
        """Of this rank since the last call: `decoded`, pictures per second that its workers can decode and augment
        between them, and `waiting`, seconds per step that the trainer stood still for them. Empty without a step."""
        if not self._steps:
            return {}
        processes = max(1, self._stream.workers if self._stream else 0)
        measured = {"decoded": processes * self._decoded / self._busy, "waiting": self._waited / self._steps}
        self._busy, self._decoded, self._waited, self._steps = 0.0, 0, 0.0, 0
        return measured

    def close(self) -> None:
        """End the workers; a later batch starts others."""
        if self._stream:
            self._stream.close()
            self._deaths += self._stream.restarts
            self._stream = None

    def drawn(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample (B,) and its augmentation (B,), int64, of this rank's rows at `step`."""
        epochs_B, samples_B = self.order.rows(step)
        return samples_B, turns(epochs_B, self.augmentations)

    def augmented(self, wanted: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[Tensor]:
        """Pictures (B, C, H, W) of any samples (B,) in any augmentations (B,), batch by batch, not mixed.

        Raises:
            ValueError: a damaged sample, where those are to end the run.
        """
        if not wanted:
            return
        stream = self._open(self._train, lambda k: Task(*wanted[k]), 0, len(wanted), len(wanted[0][0]))
        try:
            for _ in wanted:
                with self._alive():
                    drawn: Batch = next(stream)
                self._note(drawn)
                yield self._move(drawn.pictures)
        finally:
            stream.close()

    def _task(self, step: int) -> Task:
        return Task(*self.drawn(step))

    def _ahead(self, step: int) -> Stream:
        """Training batches from `step` on."""
        return self._open(self._train, self._task, step, None, self.global_batch // self.order.world)

    def _open(
        self, decoding: Decoding, tasks: Callable[[int], Task], first: int, last: int | None, rows: int
    ) -> Stream:
        result_bytes = rows * 3 * self._image_size**2 * 4
        workers = usable(min(self._workers, (last or self._workers)), result_bytes)
        return Stream(decoding, tasks, first, last, workers, pin=self.device.type == "cuda")

    def _note(self, drawn: Batch) -> None:
        self._busy += drawn.seconds
        self._decoded += len(drawn.labels)
        for sample, reason in drawn.bad:
            if self._corrupt == "stop":
                raise Unreadable(
                    f"{self._source.place(sample)}: {reason}: write it again, or leave damaged pictures out "
                    "with corrupt skip."
                )
            self._bad[sample] = reason
        if drawn.lost:
            raise Unreadable(
                f"{self.name}: {_REPLACEMENTS} samples one after the other cannot be read ({drawn.bad[-1][1]}): "
                f"{_AGAIN}."
            )

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Inside, workers that die of what they read end the run with a sentence."""
        try:
            yield
        except Lost as error:
            raise Unreadable(f"{self.name}: the processes that read it have died ({error}): {_AGAIN}.") from error

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


class Task(NamedTuple):
    """What to decode."""

    samples_B: np.ndarray
    augmentations_B: np.ndarray | None
    """None does not augment."""


class Batch(NamedTuple):
    """What became of a task."""

    pictures: Tensor
    labels: Tensor
    bad: list[tuple[int, str]]
    """Samples that could not be read, and why."""
    lost: bool
    """A damaged sample found no replacement."""
    seconds: float


class Decoding(Dataset[Batch]):
    """Tasks to batches, in whatever process: what it draws depends on the task alone."""

    def __init__(self, source: Source, transform: _Transformed, image_size: int, seed: int, replacing: bool) -> None:
        self._source, self._transform, self._seed, self._replacing = source, transform, seed, replacing
        self._image_size = image_size

    def __getitem__(self, task: Task) -> Batch:
        started = time.perf_counter()
        pictures = _batch(len(task.samples_B), self._image_size)
        used_B = task.samples_B.copy()
        bad: list[tuple[int, str]] = []
        lost = False
        with _randomness_kept():
            for row, sample in enumerate(task.samples_B.tolist()):
                if task.augmentations_B is not None:
                    _seed(counter.key(self._seed, _AUGMENT, int(task.augmentations_B[row]), sample))
                for candidate in self._candidates(sample):
                    try:
                        picture = self._source.picture(candidate)
                    except Damaged as error:
                        bad.append((candidate, str(error)))
                        continue
                    self._transform.into(pictures[row], picture)
                    used_B[row] = candidate
                    break
                else:
                    pictures[row] = 0
                    lost |= self._replacing
        labels = torch.from_numpy(self._source.labels[used_B])
        return Batch(pictures, labels, bad, lost, time.perf_counter() - started)

    def _candidates(self, sample: int) -> Iterator[int]:
        """The sample, then those that may stand in for it, the same ones in every run."""
        yield sample
        if self._replacing:
            key, size = counter.key(_REPLACE, sample), len(self._source.labels)
            yield from counter.below(counter.bits(key, np.arange(_REPLACEMENTS)), size, width=32).tolist()


def _batch(rows: int, size: int) -> Tensor:
    """Memory for pictures (B, 3, H, W), float32, channels last; a worker takes it where the trainer can read it."""
    if get_worker_info() is None:
        return torch.empty(rows, 3, size, size, memory_format=torch.channels_last)
    shared = torch.UntypedStorage._new_shared(rows * 3 * size * size * 4)
    shape, strides = (rows, 3, size, size), (3 * size * size, 1, 3 * size, 3)
    return torch.empty(0).set_(shared, 0, shape, strides)


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """timm and torchvision draw from the three global generators; afterwards they are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _seed(key: int) -> None:
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)  # torch.manual_seed would seed all GPUs too, at a great cost


class _Transformed:
    """timm's transform for training or evaluation, with its results laid channels last where they are wanted.

    timm's steps are: on the picture, to a tensor, normalisation, on the tensor. The two in the middle are done here,
    with the same operations in another memory order (three times as fast); the others are timm's own.
    """

    def __init__(self, transform: Transform, image_size: int, source: Statistics, training: bool) -> None:
        """
        Raises:
            ValueError: settings that timm refuses.
        """
        steps = _timms(transform, image_size, source, training)
        normal = next(k for k, step in enumerate(steps) if isinstance(step, Normalize))
        self._on_picture, self._on_tensor = steps[: normal - 1], steps[normal + 1 :]
        # A row of pixels each, so that normalisation is vectorised.
        self._mean, self._std = (torch.tensor(values).repeat(image_size) for values in (source.mean, source.std))

    def into(self, place: Tensor, picture: Image.Image) -> None:
        """Transform a picture into `place` (3, H, W), float32, channels last."""
        for step in self._on_picture:
            picture = step(picture)
        pixels = place.permute(1, 2, 0).flatten(1)
        pixels.copy_(torch.from_numpy(np.array(picture)).flatten(1))
        pixels.div_(255).sub_(self._mean).div_(self._std)
        for step in self._on_tensor:
            step(place)


def shown(picture: Image.Image, transform: Transform, image_size: int, like: Statistics) -> Tensor:
    """What a model sees of a picture in evaluation: (3, H, W), float32, normalised as its training set was."""
    place = _batch(1, image_size)[0]
    _Transformed(transform, image_size, like, training=False).into(place, picture)
    return place


def _timms(transform: Transform, image_size: int, source: Statistics, training: bool) -> list[Any]:
    """The steps from an RGB picture to (3, H, W), float32. Raises ValueError for settings that timm refuses."""
    if len(transform.scale) != 2 or not 0 < transform.scale[0] <= transform.scale[1] <= 1:
        raise ValueError(
            f"--data.NAME.transform.scale {transform.scale}: use two fractions of the picture, like 0.08 1.0"
        )
    if not 0 < transform.crop_fraction <= 1:
        raise ValueError(f"--data.NAME.transform.crop_fraction {transform.crop_fraction}: use a fraction, like 0.875")
    for name in ("flip", "erasing"):
        if not 0 <= getattr(transform, name) <= 1:
            raise ValueError(f"--data.NAME.transform.{name} {getattr(transform, name)}: use a probability from 0 to 1")
    if transform.rand_augment and not transform.rand_augment.startswith("rand-"):
        raise ValueError(
            f"--data.NAME.transform.rand_augment {transform.rand_augment} is not timm's spelling:"
            " use rand-m9-mstd0.5-inc1"
        )
    try:
        made = create_transform(
            image_size,
            is_training=training,
            scale=transform.scale,
            hflip=transform.flip,
            color_jitter=transform.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=transform.rand_augment or None,
            re_prob=transform.erasing,
            re_mode="pixel",
            interpolation="bicubic",
            mean=source.mean,
            std=source.std,
            crop_pct=1.0 if transform.squash else transform.crop_fraction,
            crop_mode="squash" if transform.squash else "center",
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--data.NAME.transform: timm refuses rand_augment {transform.rand_augment!r} or color_jitter "
            f"{transform.color_jitter} ({type(error).__name__} {error}): use rand-m9-mstd0.5-inc1 and 0.4, for example"
        ) from error
    steps: list[Any] = made.transforms
    for step in steps:
        for op in getattr(step, "ops", []):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
    return steps


def _posterize(picture: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm asks for 0 bits at the largest magnitude: a black picture, which Pillow gave until it came to refuse it."""
    return auto_augment.posterize(picture, bits) if bits else Image.new(picture.mode, picture.size)


def _shortened(reasons: list[str]) -> str:
    return "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
