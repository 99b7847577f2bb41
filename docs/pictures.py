"""Program: draws the pictures of README and docs.

    make pictures

Reads what `make demo` left: --work=work/toy and --data=data/toy. Writes docs/*.png: the contact
sheet of the evaluation, the page in a browser, and labelling as docs/your_data.md shows it, for
which two of the scenes are labelled again, by too few words and by all of them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags
from playwright.sync_api import sync_playwright

from fmbseg_jax.errors import UserError
from fmbseg_jax.runs import program

DOCS = Path(__file__).resolve().parent
_PAGE = "test_000001.png"  # sail boats on water below a sky
_LABELLED = "train_000007.png", "train_000003.png"  # with water, and without
_SIZE = {"width": 1200, "height": 1330}


def picture_of_the_page(export: Path, image: Path, out: Path) -> None:
    """Starts the page, segments an image, clicks a word, and takes a picture."""
    command = [sys.executable, "-m", "fmbseg_jax.app", f"--model={export}"]
    command.append(f"--examples={image.parent}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as page:
        try:
            assert page.stdout
            address = next(
                found[0] for line in page.stdout if (found := re.search(r"http://\S+", line))
            )
            _take(address, image, out)
        finally:
            page.terminate()


def _take(address: str, image: Path, out: Path) -> None:
    browser_path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if not browser_path:
        raise UserError("No chromium or google-chrome. Install one: apt install chromium")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=browser_path, args=arguments)
        tab = browser.new_page(viewport=_SIZE)
        tab.goto(address)
        tab.wait_for_selector("#segment")
        tab.set_input_files("#image input[type=file]", image)
        tab.wait_for_selector("#result img")
        tab.locator("#legend .token", has_text="sail boat").click()
        tab.wait_for_selector("#similarity img")
        tab.mouse.move(0, 0)
        tab.wait_for_timeout(1000)
        tab.screenshot(path=out)
        browser.close()


def pictures_of_labelling(images: Path, words: str, out: Path) -> list[Path]:
    """Labels two scenes; returns their pictures."""
    with tempfile.TemporaryDirectory() as folder:
        chosen, work = Path(folder) / "images", Path(folder) / "work"
        chosen.mkdir()
        for name in _LABELLED:
            shutil.copy(images / name, chosen)
        command = [sys.executable, "-m", "labelling", "--config=configs/toy.py", "--figures=2"]
        command += [f"--images={chosen}", f"--words={words}", f"--workdir={work}"]
        subprocess.run(command, check=True)
        made = [work / "figures" / "labelling" / f"{name}.png" for name in _LABELLED]
        return [Path(shutil.copy(path, out / path.name)) for path in made]


def main() -> None:
    work, data = Path(FLAGS.work), Path(FLAGS.data)
    sheet = work / "evaluation" / "test" / "contact_sheet.png"
    if not sheet.exists():
        raise UserError(f"No {sheet}. Run `make demo` first.")
    shutil.copy(sheet, DOCS / "contact_sheet.png")
    picture_of_the_page(work / "export", data / "test" / "images" / _PAGE, DOCS / "app.png")
    with tempfile.TemporaryDirectory() as folder:
        out, images = Path(folder), data / "train" / "images"
        with_water, _ = pictures_of_labelling(images, str(data / "train" / "words.txt"), out)
        shutil.copy(with_water, DOCS / "labelling.png")
        _, without = pictures_of_labelling(images, "water,sky", out)
        shutil.copy(without, DOCS / "too_few_words.png")
    print(f"The pictures are in {DOCS}.")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("work", "work/toy", "Work folder of `make demo`.")
    flags.DEFINE_string("data", "data/toy", "Scenes of `make demo`.")
    program.run(main)
