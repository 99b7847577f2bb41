"""What segmenting a folder leaves: for each image its files, and for all of them a COCO file.

labels/NAME.png      word index of each pixel, in the colours of the legend
overlays/NAME.jpg    the image under them, with the legend
scores/NAME.npz      similarities of each pixel with each word, where asked for
coco.json            run-length encoded masks, one for each word of an image
contact_sheet.png    some of the images
words.txt            the words, index 0 first
skipped.tsv          images that cannot be read, with the reason
made_from.jsonl      size and time of change of each image's file
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fmbseg_jax.data import images, label_maps
from fmbseg_jax.data.images import USUAL, Reading
from fmbseg_jax.data.sources import Sources, State
from fmbseg_jax.io import files
from fmbseg_jax.outputs import coco_writer, colours, overlays
from fmbseg_jax.vocabulary import IGNORE, synonyms, unlike

_SHEET, _TILE = 12, 240  # images in the contact sheet; side of each, in pixels


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The folder that results go to, which mirrors that of the images."""

    out: Path
    images: Path
    """The folder that the names of images are relative to."""
    words: Sequence[str]
    pngs: Mapping[str, str]
    """By name of the image, the name of its label map, as `finding.png_names` has them."""
    with_scores: bool
    reading: Reading = USUAL
    """How image files are read."""

    @functools.cached_property
    def _sources(self) -> Sources:
        return Sources(self.out / "made_from.jsonl")

    def files(self, name: str) -> list[Path]:
        """What is written for an image; all of it there, the image is done."""
        png = Path(self.pngs[name])
        paths = [self.out / "labels" / png, self.out / "overlays" / png.with_suffix(".jpg")]
        return paths + [self.out / "scores" / png.with_suffix(".npz")] * self.with_scores

    def done(self, name: str) -> bool:
        """Whether an image needs nothing more: all is there, and of the image as it is now."""
        there = all(path.is_file() for path in self.files(name))
        return there and self._sources.is_current(name, self.images / name)

    def write(
        self,
        name: str,
        made_from: State,
        image: np.ndarray,
        labels: np.ndarray,
        scores: np.ndarray | None,
    ) -> None:
        """Writes what was found in an image.

        Args:
          made_from: the state of its file before it was read.
          labels: uint16 [H, W].
          scores: float16 [H, W, K], with `with_scores`.
        """
        overlay, palette = io.BytesIO(), colours.palette(len(self.words))
        painted = overlays.overlay(image, labels, len(self.words))
        picture = Image.fromarray(
            overlays.with_legend(painted, labels, self._titles, self.background)
        )
        picture.save(overlay, "JPEG", quality=90)
        contents = [
            label_maps.encode_coloured(labels, palette, colours.UNLABELLED), overlay.getvalue()
        ]  # fmt: skip
        if scores is not None:
            arrays = io.BytesIO()
            np.savez_compressed(arrays, similarities=scores, words=np.asarray(self.words))
            contents.append(arrays.getvalue())
        for path, content in zip(self.files(name), contents, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, content)
        self._sources.add(name, made_from)

    def finish(
        self, names: Sequence[str], skipped: Mapping[str, str], made_by: str
    ) -> dict[str, float]:
        """Writes what is about all images.

        Args:
          names: of those that are done.
          skipped: of the others, with the reasons.

        Returns:
          By word, and for the background, its share of all pixels, the largest first.
        """
        files.write_table(self.out / "skipped.tsv", skipped)
        counts: Counter[int] = Counter()

        def counted() -> Iterator[tuple[str, np.ndarray]]:
            for name, labels in self._maps(names):
                values, times = np.unique(labels, return_counts=True)
                counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
                yield name, labels

        coco_writer.write(self.out / "coco.json", self._titles, counted(), made_by)
        evenly = np.linspace(0, len(names) - 1, min(_SHEET, len(names))).round().astype(int)
        self._write_sheet([names[i] for i in evenly])
        titles = {IGNORE: self.background, **dict(enumerate(self._titles))}
        return {titles[i]: count / counts.total() for i, count in counts.most_common()}

    @property
    def background(self) -> str:
        """What pixels without a word are called in pictures and in the summary."""
        return unlike("background", self.words)

    @property
    def _titles(self) -> list[str]:
        """What words are called in pictures and in the COCO file: by the first of their names."""
        return [synonyms(word)[0] for word in self.words]

    def _maps(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        for name in names:
            yield (
                name,
                label_maps.read(self.files(name)[0], len(self.words), self.reading.megapixels),
            )

    def _write_sheet(self, names: Sequence[str]) -> None:
        examples, present = [], set()
        for name, labels in self._maps(names):
            image = images.decode(files.read_file(self.images / name), self.reading, name)
            pair = image, overlays.overlay(image, labels, len(self.words))
            examples.append([overlays.fit(one, _TILE) for one in pair])  # large ones are not kept
            present |= set(np.unique(labels).tolist())
        sheet = overlays.contact_sheet(
            ["image", "segmentation"],
            examples,
            self._titles,
            across=2,
            tile=_TILE,
            captions=names,
            present=sorted(present - {IGNORE}),
            ignored=self.background if IGNORE in present else "",
        )
        files.write_atomically(self.out / "contact_sheet.png", overlays.png(sheet))
