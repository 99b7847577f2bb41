"""Program: a folder of images and words → label PNGs and overlays.

    fmbseg segment --model=work/mine/export --images=photos --words="sky,grass" --out=segmented

Reads an exported aligner, its encoders, and a folder of images. Writes OUT/labels/NAME.png (word
indices; the words are in OUT/words.txt), OUT/overlays/NAME.png and OUT/contact_sheet.png. Files
that cannot be read are listed at the end. Run again to continue.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from fmbseg_jax import figures, logs, program, vocabulary, workfolder
from fmbseg_jax.data import images, label_maps
from fmbseg_jax.errors import UserError
from fmbseg_jax.loading import load
from fmbseg_jax.segmenter import Segmenter

_SHEET_ROWS = 8
_EXAMPLE = (__doc__ or "").split("\n\n")[1]


def segment_images(
    segmenter: Segmenter, folder: Path, words: tuple[str, ...], out: Path, *, strict: bool
) -> dict[str, str]:
    """Segments every image under `folder`; returns the reasons of those that cannot be read."""
    names = images.find_images(folder)
    pngs = images.png_names(names)
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"--out={out} lies in --images={folder}, so that its pictures would be taken for "
            "images the next time. Give a folder beside it."
        )
    with workfolder.hold(out):
        _claim(out, segmenter, words, folder)
        return _segment(segmenter, folder, words, out, pngs, strict=strict)


def _segment(
    segmenter: Segmenter,
    folder: Path,
    words: tuple[str, ...],
    out: Path,
    pngs: dict[str, str],
    *,
    strict: bool,
) -> dict[str, str]:
    outputs = {name: (out / "labels" / png, out / "overlays" / png) for name, png in pngs.items()}
    todo = [name for name in pngs if not all(path.exists() for path in outputs[name])]
    skipped: dict[str, str] = {}
    with logs.progress(len(pngs), "segment", len(pngs) - len(todo)) as bar:
        for name in todo:
            try:
                image = images.decode((folder / name).read_bytes())
            except (images.ImageError, OSError) as error:
                if strict:
                    raise UserError(f"{folder / name} {error}") from None
                skipped[name] = str(error)
            else:
                labels = segmenter.segment(image, words)
                _write(outputs[name], image, labels, len(words))
            bar.update()
    overlays = {name: paths[1] for name, paths in outputs.items() if name not in skipped}
    _write_sheet(out, overlays, folder, words)
    return skipped


def _claim(out: Path, segmenter: Segmenter, words: tuple[str, ...], folder: Path) -> None:
    """Refuses results made with other words, another model, or from another folder of images."""
    made = {
        "words": list(words),
        "model": segmenter.fingerprint,
        "images": str(folder.resolve()),
    }
    workfolder.remember(out / "segment.json", made, "Give another --out, or delete that folder.")
    images.write_atomically(out / "words.txt", ("\n".join(words) + "\n").encode())


def _write(paths: tuple[Path, Path], image: np.ndarray, labels: np.ndarray, words: int) -> None:
    picture = io.BytesIO()
    Image.fromarray(figures.overlay(image, labels, words)).save(picture, "PNG")
    contents = label_maps.encode(labels.astype(np.uint16)), picture.getvalue()
    for path, content in zip(paths, contents, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        images.write_atomically(path, content)


def _write_sheet(
    out: Path, overlays: dict[str, Path], folder: Path, words: tuple[str, ...]
) -> None:
    step = max(1, len(overlays) // _SHEET_ROWS)
    rows = [
        [
            images.decode((folder / name).read_bytes()),
            np.asarray(Image.open(overlay)),
        ]
        for name, overlay in list(overlays.items())[::step][:_SHEET_ROWS]
    ]
    if rows:
        sheet = figures.contact_sheet(["image", "segmentation"], rows, words)
        Image.fromarray(sheet).save(out / "contact_sheet.png")


def main() -> None:
    for name in ("model", "images", "words", "out"):
        if not FLAGS[name].value:
            raise UserError(f"--{name} is missing. For example:\n{_EXAMPLE}")
    words = vocabulary.parse_words(FLAGS.words)
    names = images.find_images(FLAGS.images)  # before the model is loaded
    segmenter = load(FLAGS.model, vision=FLAGS.vision, clip=FLAGS.clip)
    out = Path(FLAGS.out)
    skipped = segment_images(segmenter, Path(FLAGS.images), words, out, strict=FLAGS.strict)
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    if len(skipped) == len(names):
        raise UserError(f"None of the images in {FLAGS.images} can be read.")
    print(f"Label maps, overlays and contact_sheet.png are in {out}; skipped: {len(skipped)}.")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("model", "", "Exported aligner: the export/ folder of a work folder.")
    flags.DEFINE_string("images", "", "Folder of images; its sub-folders count too.")
    flags.DEFINE_string("words", "", 'Words to segment by: "sky,grass", or a file with one a line.')
    flags.DEFINE_string("out", "", "Where the results go; made if needed.")
    flags.DEFINE_string("vision", "", "Where its vision encoder is now, if that has moved.")
    flags.DEFINE_string("clip", "", "Where its CLIP is now, if that has moved.")
    flags.DEFINE_bool("strict", False, "Stop at the first image that cannot be read.")
    program.run(main)
