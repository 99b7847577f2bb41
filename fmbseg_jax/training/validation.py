"""Zero-shot mIoU while training, on a few images of a small set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fmbseg_jax.config import Config
from fmbseg_jax.data import images, label_maps
from fmbseg_jax.data.example import PseudoLabel, read_metadata, read_pseudo_label
from fmbseg_jax.data.records import open_records
from fmbseg_jax.datasets.folder import open_folder
from fmbseg_jax.errors import UserError
from fmbseg_jax.evaluation import metrics
from fmbseg_jax.sharing.loading import untrained
from fmbseg_jax.vocabulary.classes import Classes


class Labelled(Protocol):
    """Images and label maps, by name."""

    @property
    def words(self) -> Sequence[str]: ...

    @property
    def names(self) -> Sequence[str]: ...

    def image(self, name: str) -> np.ndarray:
        """uint8 [H, W, 3]."""

    def labels(self, name: str) -> np.ndarray:
        """uint16 [H, W], word index or IGNORE."""


class PseudoLabels:
    """WORKDIR/pseudo_labels as `Labelled`; a name is a record's number."""

    def __init__(self, workdir: Path, reading: images.Reading):
        folder, self._reading = workdir / "pseudo_labels", reading
        self.words: Sequence[str] = read_metadata(folder)["words"]
        self._records = open_records(folder)
        self.names: Sequence[str] = [str(i) for i in range(len(self._records))]

    def image(self, name: str) -> np.ndarray:
        """uint8 [H, W, 3]."""
        with self._records.naming(int(name)):
            label = self._read(name)
            return label_maps.image_of(label.labels, label.image, label.filename, self._reading)

    def labels(self, name: str) -> np.ndarray:
        """uint16 [H, W], word index or IGNORE."""
        return self._read(name).labels

    def _read(self, name: str) -> PseudoLabel:
        return read_pseudo_label(self._records, int(name), len(self.words))


class Validation:
    """Measures one aligner after another, on the devices of this host."""

    def __init__(self, config: Config, model: dict[str, Any]):
        """Opens `train.validate_on`; `model` is what the export's model.json will hold."""
        root = Path(config.train.validate_on)
        self._set = _open(root, config.eval.reading)
        count = min(config.train.validate_images, len(self._set.names))
        evenly = np.linspace(0, len(self._set.names) - 1, count).round().astype(int)
        self._names = [self._set.names[i] for i in evenly]
        self._segmenter, self._aligned = untrained(model, config.eval)
        self._classes = Classes.of(self._set.words)

    def miou(self, params: Any) -> float:
        """Mean over the words that are there, in [0, 1]; NaN where no pixel is labelled."""
        self._aligned.use(params)
        words = len(self._set.words)
        prepared = ((name, self._segmenter.prepare(self._set.image(name))) for name in self._names)
        confusion = np.zeros((words, words), np.int64)
        for name, labels, *_ in self._segmenter.label_maps(prepared, self._classes):
            confusion += metrics.confusion_matrix(labels, self._set.labels(name), words)
        return metrics.mean_iou(confusion)


def _open(root: Path, reading: images.Reading) -> Labelled:
    if (root / "pseudo_labels").is_dir():
        return PseudoLabels(root, reading)
    try:
        return open_folder(root, reading)
    except UserError as error:
        raise UserError(
            f"train.validate_on={root} is neither a work folder with pseudo_labels/ nor an "
            f"annotated folder. {error}"
        ) from None
