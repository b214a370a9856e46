"""Trained X-VLMs answer: a question about a picture, or which of several captions fits it.

A run's export is a folder: `model.safetensors`, `config.json` (which model, and what it was shown), the tokenizer's
files and, of a model for questions, `answers.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hetero_kt import files
from hetero_kt.config import Data, Transform
from hetero_kt.data.pictures import MOST_BYTES, Damaged, decoded, shown
from hetero_kt.data.text import Sentences, Tokenizer, load_tokenizer
from hetero_kt.data.vqa import answer_list
from hetero_kt.documents import mapping, read_json, text, whole
from hetero_kt.files import publish_folder, write_whole
from hetero_kt.messages import first_line, printable
from hetero_kt.models import xvlm, xvlm_weights
from hetero_kt.tasks import retrieval, vqa
from hetero_kt.weights import save_tensors


def save(name: str, config: Data, loader: Any, tokenizer: Tokenizer, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the export of the model `name`, trained on `loader` of `config`, in place of one that is there."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    about = {
        "name": name,
        "task": xvlm.TASKS[config.name],
        "image_size": config.image_size,
        "length": config.text.length,
        "candidates": config.candidates or vqa.CANDIDATES,
        "mean": list(loader.mean),
        "std": list(loader.std),
        "transform": asdict(config.transform),
    }
    (part / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    if config.name == "vqa":
        (part / "answers.json").write_text(json.dumps(loader.answers.texts) + "\n")
    tokenizer.save(part)
    save_tensors(state, part / "model.safetensors")
    publish_folder(part, folder)


class Trained:
    """A trained model with all that it needs to be asked."""

    def __init__(self, folder: str | Path) -> None:
        """`folder` is an export, or a run's folder with one in it.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        self.folder = _export(Path(folder))
        try:
            about = mapping(read_json(self.folder / "config.json"), "the file")
            self.task: Any = text(about["task"], "task")
            if self.task not in xvlm.FORMS:
                raise ValueError(f"no task is called {self.task[:40]}")
            self.length = whole(about["length"], "length", 1, 2**20)
            self.candidates = whole(about["candidates"], "candidates", 1)
            self.image_size = whole(about["image_size"], "image_size", 1, 2**14)
            self.mean, self.std = tuple(about["mean"]), tuple(about["std"])
            self.transform = Transform(**about["transform"] | {"scale": tuple(about["transform"]["scale"])})
            name = text(about["name"], "name")
            texts = read_json(self.folder / "answers.json") if self.task == "vqa" else []
            texts = [text(one, "an answer") for one in texts]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = printable(first_line(error))
            raise ValueError(f"{self.folder} is no export of an X-VLM ({reason}): name a run's.") from error
        self.tokenizer: Tokenizer = load_tokenizer(self.folder)
        self.answers = answer_list(texts, self.tokenizer, self.length) if texts else None
        file = str(self.folder / "model.safetensors")
        self.model, _ = xvlm.build(name, self.task, vocabulary=self.tokenizer, image_size=self.image_size, init=file)
        self.model.eval()

    def ask(self, image: str | Path, question: str, top: int = 5) -> list[tuple[str, float]]:
        """The `top` best answers to a question about a picture, found as in evaluation, and the probability with which
        the model would write each.

        Raises:
            ValueError: a model that was not trained for questions, an empty question, or a file that is no picture.
        """
        if self.answers is None:
            raise ValueError(f"{self.folder} was trained to match captions: give --captions instead of a question.")
        if not question.strip():
            raise ValueError("the question is empty: ask something about the picture.")
        k = max(self.candidates, top)
        best, scores = vqa.answer(self.model, self._picture(image), *self._tokens([question]), self.answers, k)
        found = zip(best[0, :top].tolist(), scores[0, :top].double().exp().tolist(), strict=True)
        return [(self.answers.texts[number], chance) for number, chance in found]

    def rank(self, image: str | Path, captions: Sequence[str]) -> list[tuple[str, float]]:
        """The captions, that which fits the picture best first, and the probability of each that it fits.

        Raises:
            ValueError: a model that was trained for questions, no or empty captions, or a file that is no picture.
        """
        if self.task != "retrieval":
            raise ValueError(f"{self.folder} was trained to answer questions: ask one instead of --captions.")
        if not captions or not all(caption.strip() for caption in captions):
            raise ValueError("--captions has an empty one: give one or more descriptions of the picture.")
        fits = retrieval.match(self.model, self._picture(image), *self._tokens(captions))[0].tolist()
        return sorted(zip(captions, fits, strict=True), key=lambda one: -one[1])

    def write_official(self, file: str | Path) -> None:
        """Its weights, named as the code of X-VLM's authors reads them: a checkpoint of torch where the name ends in
        .th or .pth, else safetensors.

        Raises:
            ValueError: a file that cannot be written.
        """
        path = Path(file)
        tensors = xvlm_weights.to_official(self.model.state_dict(), self.model.name)
        # The decoder's words and their embeddings are one tensor, which that code expects twice.
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} cannot be written (it is no regular file): name another file.")
        path = Path(os.path.realpath(path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".th", ".pth"):
                write_whole(path, lambda part: torch.save({"model": tensors}, part))
            else:
                write_whole(path, lambda part: save_file(tensors, part))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be written ({first_line(error)}): name another file.") from error

    def _picture(self, path: str | Path) -> Tensor:
        try:
            picture = decoded(files.read_regular(path, MOST_BYTES), str(path))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): name a picture.") from error
        except Damaged as error:
            raise ValueError(f"{error}: name a JPEG, PNG or WebP file.") from error
        return shown(picture, self.transform, self.image_size, self).unsqueeze(0)

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, (len(texts), L)."""
        rows = Sentences(texts, self.tokenizer, self.length, str(self.folder))
        ids, mask = rows.take(np.arange(len(texts)), int(rows.lengths.max()))
        return torch.from_numpy(ids), torch.from_numpy(mask)


def _export(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: name a run's folder, or its export.")
    if (folder / "model.safetensors").is_file():
        return folder
    found = sorted(file.parent for file in folder.rglob("export/*/model.safetensors"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"{folder} holds no exported X-VLM: name the folder of a finished run.")
    raise ValueError(f"{folder} holds {len(found)} models: name one, {found[0]} for example.")
