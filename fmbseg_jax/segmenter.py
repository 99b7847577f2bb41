"""Segmenter: an image and words → a label map."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmbseg_jax import checkpoint, sliding, vocabulary
from fmbseg_jax import config as config_lib
from fmbseg_jax.data import images
from fmbseg_jax.errors import UserError
from fmbseg_jax.models import aligner as aligners
from fmbseg_jax.models import encoders, weights
from fmbseg_jax.similarity import similarities
from fmbseg_jax.text import text_features

_WINDOWS = 8  # encoded at once, at most


class Segmenter:
    """A frozen vision encoder, a trained aligner and a text encoder, ready for any image and words.

    segmenter = fmbseg_jax.load("work/toy/export")
    labels = segmenter.segment(image, ["sky", "grass", "sail boat"])
    """

    def __init__(
        self,
        model: dict[str, Any],
        params: Any,
        protocol: config_lib.Eval | None = None,
        *,
        vision: str = "",
        clip: str = "",
    ):
        """Loads the encoders.

        Args:
          model: what an export's model.json holds.
          params: of the aligner; None leaves `params` to be set.
          protocol: sizes, windows and template; None takes those of the training's config.
          vision, clip: where the encoders are now, a folder or hub id each; "" where they were at
            training. Other weights than those are refused.

        Raises:
          UserError: an encoder cannot be found or is another one.
        """
        self.model, self.params = model, params
        self._eval = protocol or _protocol(model["config"])
        vision = _same_weights(model, "vision", vision)
        self._vision, self._vision_params = encoders.load_vision(vision)
        self._text = text_features(_same_weights(model, "clip", clip))
        patch = self._vision.spec.patch
        if self._eval.window % patch:
            raise UserError(
                f"eval.window = {self._eval.window} is not a multiple of the encoder's patch of "
                f"{patch} pixels."
            )
        self._aligner = aligners.create(**model["aligner"])
        self._similarities = jax.jit(self._window_similarities)

    @property
    def shapes(self) -> Any:
        """Of `params`, without any array."""
        some = jnp.zeros((1, 4, self._vision.spec.transformer.width))
        return jax.eval_shape(self._aligner.init, jax.random.key(0), some)["params"]

    @property
    def fingerprint(self) -> str:
        """Differs between any two models whose label maps may differ."""
        leaves = jax.tree.leaves(self.params)
        digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves))
        encoders = (self.model["vision"]["hash"], self.model["clip"]["hash"])
        digest.update(repr((self._eval, self.model["aligner"], encoders)).encode())
        return digest.hexdigest()[:16]

    def segment(self, image: np.ndarray, words: Sequence[str]) -> np.ndarray:
        """The most similar word of each pixel.

        Args:
          image: uint8 [H, W, 3], RGB.
          words: K words or phrases.

        Returns:
          int32 [H, W], indices into `words`.
        """
        layout, of_windows = self._encode(image, words)
        return np.asarray(layout.segment(of_windows))

    def similarities(self, image: np.ndarray, words: Sequence[str]) -> np.ndarray:
        """Cosine similarity of each pixel with each word, float32 [H, W, K], in [-1, 1]."""
        layout, of_windows = self._encode(image, words)
        return np.asarray(layout.stitch(of_windows))

    def _encode(self, image: np.ndarray, words: Sequence[str]) -> tuple[sliding.Layout, Array]:
        """The windows' layout and their similarities [n, h, w, K]."""
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(
                f"An image is a uint8 array [H, W, 3], RGB in [0, 255]; got {image.dtype} "
                f"{list(image.shape)}. fmbseg_jax.data.images.decode reads any image file so."
            )
        words = vocabulary.check_words(words, "the list of words")
        text = jnp.asarray(self._text(words, self._eval.template))
        spec, protocol = self._vision.spec, self._eval
        height, width = image.shape[:2]
        resized = images.resize(image, images.resized_shape(height, width, protocol.short_side))
        side = protocol.window // spec.patch
        layout = sliding.Layout(
            resized.shape[:2], protocol.window, protocol.stride, (side, side), (height, width)
        )
        windows = layout.windows(resized)
        parts = [
            self._similarities(self._vision_params, self.params, windows[i : i + _WINDOWS], text)
            for i in range(0, len(windows), _WINDOWS)
        ]
        return layout, jnp.concatenate(parts)

    def _window_similarities(
        self, vision_params: Any, aligner_params: Any, windows: Array, text: Array
    ) -> Array:
        spec = self._vision.spec
        normal = images.normalise(windows, spec.mean, spec.std)
        patches = self._vision.apply({"params": vision_params}, normal).patches
        b, h, w, d = patches.shape
        aligned = self._aligner.apply({"params": aligner_params}, patches.reshape(b, h * w, d))
        return similarities(aligned, text).reshape(b, h, w, -1)


def _protocol(leaves: dict[str, Any]) -> config_lib.Eval:
    """The config's eval section; its other fields may be those of another version."""
    ours = {name: value for name, value in leaves.items() if name.startswith("eval.")}
    return config_lib.unflatten(ours).eval


def _same_weights(model: dict[str, Any], name: str, source: str) -> str:
    """Where the encoder "vision" or "clip" is; raises UserError where it is not, or is another."""
    trained = model[name]
    source = source or trained["source"]
    try:
        found = weights.content_hash(source)
    except UserError as error:
        raise UserError(
            f"The {name} encoder that this aligner was trained with was at {trained['source']}. "
            f"Give the place where it is now: --{name}=FOLDER (in Python {name}=...).\n{error}"
        ) from None
    if found != trained["hash"]:
        raise UserError(
            f"The {name} encoder at {source} has other files (weights, config.json, ...) than the "
            f"aligner was trained with (hash {found}, then {trained['hash']}). Give those, "
            f"--{name}=FOLDER, or train again."
        )
    return source


def load(
    path: str | Path,
    protocol: config_lib.Eval | None = None,
    *,
    vision: str = "",
    clip: str = "",
) -> Segmenter:
    """Loads the exported aligner at `path`, the export/ folder of a work folder.

    The other arguments are those of `Segmenter`.

    Raises:
      UserError: the folder is no export, an encoder cannot be found or is another one.
    """
    model = checkpoint.read_model(path)
    segmenter = Segmenter(model, None, protocol, vision=vision, clip=clip)
    segmenter.params = checkpoint.load_export(path, segmenter.shapes)
    return segmenter
