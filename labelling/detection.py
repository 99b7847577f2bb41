"""Which words are in an image: votes of CLIP's crops, or image-level labels (paper, 3.2)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np
from etils import epath

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import texts
from fmbseg_jax.io.spelling import plain
from fmbseg_jax.vocabulary import synonyms

GIVEN = -1
"""Stands for the number of votes where the user gave the word."""


ImageLabels = dict[str, np.ndarray]
"""Word indices, int64 [f], ascending, by image."""


def vote(similarities: np.ndarray, min_crops: int) -> tuple[np.ndarray, np.ndarray]:
    """Each crop votes for the word most similar to its class token.

    A word with at least `min_crops` votes is in the image. There may be none: such an image gets no
    masks, its label map stays empty, and the summary counts it.

    Args:
      similarities: float [c, K], class tokens of the crops by words.

    Returns:
      Indices of the words found, int64 [f], ascending, and their votes, int32 [f].
    """
    votes = np.bincount(similarities.argmax(1), minlength=similarities.shape[1])
    found = np.flatnonzero(votes >= min_crops)
    return found, votes[found].astype(np.int32)


def read_image_labels(
    path: epath.PathLike, words: Sequence[str], names: Sequence[str]
) -> ImageLabels:
    """Reads image-level labels: lines `path<TAB>word,word`, which replace the votes.

    Nothing after the tab means that none of the words is in the image.

    Args:
      path: the file; "" for none.
      names: the images, as `finding.find_images` names them.

    Returns:
      Labels of the images that the file names; the others are voted on.
    """
    if not path:
        return {}
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"No file of image-level labels at {path}. Lines are: path<TAB>word,word")
    index = {name.lower(): i for i, word in enumerate(words) for name in (word, *synonyms(word))}
    exact, known = set(names), {plain(name): name for name in names}
    labels: ImageLabels = {}
    faults: list[tuple[str, str, Sequence[str]]] = []  # what, the name, where it should be
    for number, line in enumerate(texts.read(path).splitlines(), 1):
        if not line.strip():
            continue
        name, tab, listed = line.partition("\t")
        name = name if name in exact else known.get(plain(name), name)
        given = [plain(word.strip()) for word in listed.split(",") if word.strip()]
        unknown = [word for word in given if word.lower() not in index]
        if not tab:
            faults.append((f"line {number} has no tab: {line!r}", "", ()))
        elif name not in exact:
            faults.append((f"line {number}: no image {name!r}", name, names))
        elif name in labels:
            faults.append((f"line {number}: {name!r} again", "", ()))
        elif unknown:
            faults += [(f"line {number}: no word {word!r}", word, words) for word in unknown]
        else:
            indices = {index[word.lower()] for word in given}
            labels[name] = np.asarray(sorted(indices), np.int64)
    if faults:
        # The nearest name of 100,000 takes seconds: only for those that are shown.
        shown = [f"{what}{_nearest(name, among)}" for what, name, among in faults[:_SHOWN]]
        shown += [f"and {len(faults) - _SHOWN} more"] * (len(faults) > _SHOWN)
        raise UserError(
            f"{path} cannot be used as image-level labels:\n  " + "\n  ".join(shown) + "\n"
            "Lines are path<TAB>word,word, with paths relative to data.images and words of "
            "data.words."
        )
    return labels


_SHOWN = 10


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else ""
