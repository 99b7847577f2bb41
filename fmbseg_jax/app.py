"""Program: a web page on which any image is segmented by any words.

    fmbseg app --model=EXPORT
    fmbseg app --model=work/toy/export --examples=data/toy/test/images

Reads the aligner at EXPORT (the export/ folder of a work folder, or an id of the Hugging Face hub),
and, as examples, the first images of a folder. Prints the address to open. Drop an image, type
words; click a word in the legend for its similarity; download the label map. What people upload and
get is written to a folder of its own, for an hour or two, which goes when the program ends.

It listens to this machine alone, unless --host says otherwise; it has no login. It needs Gradio:
pip install -e ".[app]".
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

from absl import flags

from fmbseg_jax import vocabulary
from fmbseg_jax.data import finding
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine
from fmbseg_jax.runs import program
from fmbseg_jax.sharing import exports
from fmbseg_jax.sharing.loading import load
from fmbseg_jax.web import listening, visits
from fmbseg_jax.web.answers import Answers

_EXAMPLES = 12
_WORDS = 20  # of the training's, that stand in the box at first


def main() -> None:
    program.require("model")
    host = FLAGS.host.strip("[]")
    listening.check_host(host)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # all remove what was uploaded
        signal.signal(number, signal.default_int_handler)
    visits.remove_abandoned()
    with visits.folder() as folder:
        # These are read when Gradio, or httpx in it, is imported.
        listening.reach_directly(host, os.environ)
        os.environ["GRADIO_TEMP_DIR"] = str(folder.served)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["FMBSEG_CACHE"] = os.devnull  # the words that people type are written nowhere
        _serve(folder, host)


def _serve(folder: visits.Folder, host: str) -> None:
    model = exports.read_model(exports.locate(FLAGS.model))
    words = vocabulary.parse_words(FLAGS.words) if FLAGS.words else tuple(model["words"][:_WORDS])
    examples = []
    if FLAGS.examples:
        names = finding.find_images(FLAGS.examples)[:_EXAMPLES]
        examples = [Path(FLAGS.examples).resolve() / name for name in names]
    changes: dict[str, Any] = {"max_megapixels": FLAGS.max_megapixels}
    if FLAGS.deep:
        changes["deep"] = FLAGS.deep
    segmenter = load(FLAGS.model, changes, vision=FLAGS.vision, clip=FLAGS.clip)
    answers = Answers(segmenter, folder.served, folder.private)
    title = (
        f"{Path(model['vision']['source']).name}, aligned with the text of "
        f"{Path(model['clip']['source']).name} by {model['images']} images."
    )
    from fmbseg_jax.web import page

    blocks = page.build(answers, words, examples, title)
    try:
        _, address, _ = blocks.launch(
            server_name=listening.in_address(host),
            server_port=FLAGS.port or None,
            max_file_size=f"{FLAGS.max_megabytes}mb",
            prevent_thread_lock=True,
            show_error=True,
            share=False,
            ssr_mode=False,
            quiet=True,
            footer_links=[],
            theme=page.THEME,
            css=page.CSS,
            app_kwargs={"middleware": [page.gate(listening.names(host, FLAGS.names))]},
        )
    except ValueError as error:  # Gradio asks itself for the page, to see whether it is there
        raise UserError(
            f"The page cannot be reached at {host} from this machine itself ({error}). Give "
            "--host=127.0.0.1, or look at the proxies and the firewall."
        ) from None
    except OSError as error:
        machine.let_through(error)
        port = FLAGS.port or "from 7860 on"
        raise UserError(
            f"Port {port} of {host} is taken, or may not be used ({error}). Give another --port."
        ) from None
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"Whoever reaches {host} can use this page: it has no login.")
    with contextlib.suppress(KeyboardInterrupt):
        print(f"The page is at {address} Ctrl-C ends it.", flush=True)
        threading.Event().wait()
    blocks.close(verbose=False)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    program.define_model()
    flags.DEFINE_string("words", "", "Words that stand in the box at first; those of the training.")
    flags.DEFINE_string("examples", "", "Folder of images to begin with.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for every machine.")
    flags.DEFINE_list(
        "names", [], "Other names that the page is asked by, such as those of a reverse proxy."
    )
    flags.DEFINE_integer("port", 0, "Port to listen at; 0: the first free one from 7860.", 0, 65535)
    flags.DEFINE_integer("max_megabytes", 30, "Largest file that can be uploaded.", 1)
    flags.DEFINE_integer("max_megapixels", 50, "Most pixels of an image, in millions.", 1)
    flags.DEFINE_string(
        "deep", "", 'How more than 8 bits a channel are scaled: by the "file" (default) or "type".'
    )
    program.run(main)
