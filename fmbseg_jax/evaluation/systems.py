"""What can be scored: models that segment, and label maps that lie in a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fmbseg_jax.config import Eval
from fmbseg_jax.datasets.folder import Benchmark
from fmbseg_jax.encoders import identity
from fmbseg_jax.evaluation import scoring
from fmbseg_jax.evaluation.scoring import Result
from fmbseg_jax.segmentation.segmenter import Segmenter
from fmbseg_jax.sharing import exports
from fmbseg_jax.sharing.loading import clip_patches, load
from fmbseg_jax.vocabulary.classes import Classes


class System(Protocol):
    """Anything that has a label map for each image of a benchmark."""

    @property
    def name(self) -> str:
        """A key of `report.TITLES`, or what another system is called."""

    @property
    def facts(self) -> dict[str, Any]:
        """Where it comes from: paths, hashes."""

    def score(self, benchmark: Benchmark, classes: Classes, counts: Path) -> list[Result]:
        """Its result, and with `eval.pamr` a second one; `counts` is where counts are kept."""

    def label_maps(
        self, benchmark: Benchmark, classes: Classes, names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Of some images, by name, uint16 [H, W]; refined where results are."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A segmenter."""

    name: str
    segmenter: Segmenter
    facts: dict[str, Any]

    @classmethod
    def exported(cls, name: str, export: Path, protocol: Eval) -> Model:
        """An aligner."""
        model = exports.read_model(export)
        facts = {part: model[part] for part in ("aligner", "vision", "clip")}
        return cls(name, load(export, protocol), {"export": str(export.resolve()), **facts})

    @classmethod
    def clip(cls, name: str, source: str, protocol: Eval) -> Model:
        """CLIP's own patches."""
        facts = {"source": source, "hash": identity.content_hash(source)}
        return cls(name, clip_patches(source, protocol), {"clip": facts})

    def score(self, benchmark: Benchmark, classes: Classes, counts: Path) -> list[Result]:
        return scoring.segment(self.segmenter, benchmark, classes, counts, self.name)

    def label_maps(
        self, benchmark: Benchmark, classes: Classes, names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        prepared = ((name, self.segmenter.prepare(benchmark.image(name))) for name in names)
        found = self.segmenter.label_maps(prepared, classes)
        return {one.key: one.final for one in found}


@dataclasses.dataclass(frozen=True)
class Saved:
    """Label maps of a benchmark's images in a folder."""

    name: str
    folder: Path

    @property
    def facts(self) -> dict[str, Any]:
        return {"label_maps": str(self.folder.resolve())}

    def score(self, benchmark: Benchmark, classes: Classes, counts: Path) -> list[Result]:
        return [scoring.score_folder(benchmark, self.folder)]

    def label_maps(
        self, benchmark: Benchmark, classes: Classes, names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        return {name: scoring.read_prediction(self.folder, name, benchmark) for name in names}
