"""Stage 1 (paper, section 3.2): an image → its words → masks of CLIP and SAM → pseudo label.

1.1  the patches most similar to each word found are query points for SAM
1.2  SAM's automatic masks are given the word of their mean CLIP feature
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from fmbseg_jax import config
from fmbseg_jax.data import images
from fmbseg_jax.data.example import PseudoLabel
from fmbseg_jax.vocabulary import IGNORE
from labelling import detection
from labelling.clip import Clip
from labelling.compose import compose
from labelling.masks import Masks
from labelling.sam.model import Embedding, Sam

_POINTS, _AUTOMATIC = 11, 12
"""PseudoLabel.mask_stages."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """What stage 1 sees in an image, before it is composed into a label map."""

    similarities: np.ndarray
    """float32 [h, w, K], patches by all words."""
    found: np.ndarray
    """int64 [f], indices of the words in the image."""
    votes: np.ndarray
    """int32 [f]."""
    points: np.ndarray
    """float32 [f, k, 2], query points of each word found, (x, y) in pixels."""
    masks: Masks
    mask_words: np.ndarray
    """int64 [m], indices into `found`."""
    mask_scores: np.ndarray
    """float32 [m], predicted IoU."""
    mask_stages: np.ndarray
    """uint8 [m], 11 or 12."""

    def labels(self, combine: str, stages: str = "both") -> np.ndarray:
        """The label map of some stages, "1.1", "1.2" or "both": uint16 [H, W]."""
        use = np.isin(self.mask_stages, _numbers(stages))
        labels = compose(
            self.masks[use], self.mask_words[use], self.similarities[..., self.found], combine
        )
        return np.append(self.found, IGNORE).astype(np.uint16)[np.minimum(labels, len(self.found))]

    def pseudo_label(self, data: bytes, filename: str, combine: str) -> PseudoLabel:
        """The record of the image file that it was seen in."""
        return PseudoLabel(
            image=data,
            filename=filename,
            labels=self.labels(combine),
            found=self.found.astype(np.uint16),
            votes=self.votes,
            mask_words=self.found[self.mask_words].astype(np.uint16),
            mask_scores=self.mask_scores,
            mask_stages=self.mask_stages,
            points=self.points.reshape(-1, 2),
            point_words=np.repeat(self.found, self.points.shape[1]).astype(np.uint16),
        )


class Labeller:
    """Stage 1 with its models and words."""

    def __init__(self, clip: Clip, sam: Sam, words: Sequence[str], options: config.Label):
        self.clip, self.sam, self.options = clip, sam, options
        self._text = clip.text(words, options.template)

    def label_image(
        self,
        data: bytes,
        filename: str,
        given: np.ndarray | None = None,
        reading: images.Reading = images.USUAL,
    ) -> PseudoLabel:
        """Labels an image file; `given`: word indices that take the place of the votes."""
        scene = self.look(images.decode(data, reading, filename), given)
        return scene.pseudo_label(data, filename, self.options.combine)

    def look(
        self, image: np.ndarray, given: np.ndarray | None = None, stages: str | None = None
    ) -> Scene:
        """Finds the words and their masks in an image, uint8 [H, W, 3]."""
        options, size = self.options, image.shape[:2]
        tokens, patches = self.clip.crops(image, options.short_side, options.crop, options.stride)
        similarities = (patches @ self._text.T).cpu().numpy()
        if given is None:
            found, votes = detection.vote((tokens @ self._text.T).cpu().numpy(), options.min_crops)
        else:
            found, votes = given, np.full(len(given), detection.GIVEN, np.int32)
        stage_numbers = _numbers(stages or options.stages) if len(found) else []
        points = np.zeros((len(found), 0, 2), np.float32)
        candidates = [_none(size)]
        if stage_numbers:
            embedding = self.sam.embed(image)
        if _POINTS in stage_numbers:
            points = query_points(similarities[..., found], size, options.points_per_word)
            candidates.append(self._masks_from_points(embedding, points))
        if _AUTOMATIC in stage_numbers:
            candidates.append(self._classified_masks(embedding, similarities[..., found]))
        masks, mask_words, scores, numbers = zip(*candidates, strict=True)
        return Scene(
            similarities, found, votes, points, Masks.join(masks),
            *map(np.concatenate, (mask_words, scores, numbers)),
        )  # fmt: skip

    def _masks_from_points(self, embedding: Embedding, points: np.ndarray) -> _Candidates:
        """Stage 1.1: all words at once; a mask without a pixel is none."""
        low = self.sam.point_masks(embedding, torch.from_numpy(points).to(self.sam.device))
        chunks = self.sam.full_size(embedding, low.logits)
        masks = Masks.join([Masks.empty(embedding.size), *map(_packed, chunks)])
        solid = masks.areas() > 0
        return _candidates(
            masks[solid], np.flatnonzero(solid), low.ious.cpu().numpy()[solid], _POINTS
        )

    def _classified_masks(self, embedding: Embedding, similarities: np.ndarray) -> _Candidates:
        """Stage 1.2: each mask gets the word nearest to the mean of the patch features under it.

        The product with a text feature is linear: the mean of the patches' similarities is the
        similarity of their mean feature, and the features themselves are not needed here.
        """
        low = self.sam.automatic_masks(embedding, self.options.sam)
        patches = torch.from_numpy(similarities).to(self.sam.device).flatten(0, 1)
        masks, mask_words = [Masks.empty(embedding.size)], [np.zeros(0, np.int64)]
        for chunk in self.sam.full_size(embedding, low.logits):
            areas = mask_areas(chunk, similarities.shape[:2])
            mask_words.append((areas.flatten(1) @ patches).argmax(1).cpu().numpy())
            masks.append(_packed(chunk))
        return _candidates(
            Masks.join(masks), np.concatenate(mask_words), low.ious.cpu().numpy(), _AUTOMATIC
        )


_Candidates = tuple[Masks, np.ndarray, np.ndarray, np.ndarray]
"""m masks, words int64 [m] (indices of those found), scores float32 [m], stages uint8 [m]."""


def _packed(masks: torch.Tensor) -> Masks:
    return Masks.pack(masks.cpu().numpy())


def query_points(similarities: np.ndarray, size: tuple[int, int], count: int) -> np.ndarray:
    """The centres of the patches most similar to each word, as pixels of the image.

    The patch grid spans the whole image, whatever its ratio, so patch (i, j) of h × w has its
    centre at ((j + 0.5) W / w, (i + 0.5) H / h).

    Args:
      similarities: float [h, w, f].
      size: (H, W) of the image.

    Returns:
      float32 [f, k, 2], (x, y), best first; k = count, or all patches where there are fewer.
    """
    height, width, words = similarities.shape
    order = np.argsort(-similarities.reshape(-1, words), axis=0, kind="stable")[:count]
    rows, columns = np.unravel_index(order.T, (height, width))
    centres = [(columns + 0.5) * (size[1] / width), (rows + 0.5) * (size[0] / height)]
    return np.stack(centres, axis=-1).astype(np.float32)


def mask_areas(masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The area of each mask in each patch, in pixels: bool [m, H, W] → float32 [m, h, w].

    Exact where patches cut pixels, and with no loop: a product with two small matrices.
    """
    rows = _overlaps(grid[0], masks.shape[1]).to(masks.device)
    columns = _overlaps(grid[1], masks.shape[2]).to(masks.device)
    return rows @ (masks.float() @ columns.T)


def _overlaps(cells: int, pixels: int) -> torch.Tensor:
    """float32 [cells, pixels]: how much of each pixel lies in each of the equal cells of a line."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * (pixels / cells)
    left = torch.arange(pixels, dtype=torch.float64)
    right_ends = torch.minimum(edges[1:, None], left + 1)
    return (right_ends - torch.maximum(edges[:-1, None], left)).clamp(min=0).float()


def _numbers(stages: str) -> list[int]:
    return {"1.1": [_POINTS], "1.2": [_AUTOMATIC], "both": [_POINTS, _AUTOMATIC]}[stages]


def _candidates(
    masks: Masks, mask_words: np.ndarray, scores: np.ndarray, stage: int
) -> _Candidates:
    return masks, mask_words, scores, np.full(len(masks), stage, np.uint8)


def _none(size: tuple[int, int]) -> _Candidates:
    words, scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
    return _candidates(Masks.empty(size), words, scores, 0)
