"""The web page, by Gradio: what is where, and what happens when something is clicked."""

from __future__ import annotations

import functools
import html
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import gradio.queueing
import numpy as np
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine
from fmbseg_jax.outputs.colours import UNLABELLED
from fmbseg_jax.outputs.overlays import percent
from fmbseg_jax.vocabulary import unlike
from fmbseg_jax.web.answers import Answers
from fmbseg_jax.web.listening import host_of

_AT_ONCE = 8  # people whose questions are answered at once; they meet at the accelerator only
_KEPT = 3600  # seconds for which uploads and results stay on disk
_FONT = ["ui-sans-serif", "system-ui", "sans-serif"]  # none is fetched from elsewhere
THEME = gr.themes.Soft(font=_FONT, font_mono=["ui-monospace", "monospace"])
CSS = """
#legend .token { cursor: pointer }
#image img, #result img, #similarity img { width: 100%; height: 100%; object-fit: contain }
footer { display: none !important }
"""
_BACKGROUND = ";"  # stands for it among the words, of which none can be called so


class _Quiet:
    """What Gradio prints its tracebacks by: they would have what visitors type in them."""

    @staticmethod
    def print_exc() -> None:
        print(f"A request has failed ({type(sys.exception()).__name__}).", file=sys.stderr)


gradio.queueing.traceback = _Quiet  # type: ignore[assignment]


def build(
    answers: Answers, words: Sequence[str], examples: Sequence[Path], title: str
) -> gr.Blocks:
    """The page.

    Args:
      words: those that stand in the box at first.
      examples: images to begin with.
      title: what is said of the model.
    """
    with gr.Blocks(title="FMbSeg", analytics_enabled=False, delete_cache=(_KEPT, _KEPT)) as page:
        gr.Markdown("## Segment any image by any words")
        gr.HTML(f"<p>{html.escape(title)}</p>")  # it names files of whoever made the model
        with gr.Row():
            with gr.Column():
                upload = gr.Image(
                    label="Image",
                    sources=["upload", "clipboard"],
                    height=380,
                    elem_id="image",
                    type="filepath",
                )
                # Not opened by Gradio: `Answers` opens it, and says what is wrong with it. (Of a
                # class of our own, Gradio would write a .pyi beside this file.)
                upload.preprocess = lambda file: file and file.path  # type: ignore
                typed = gr.Textbox(
                    ", ".join(words), lines=1, max_lines=4, label="Words", elem_id="words",
                    info="Separated by commas. Several names of one class: sofa;couch",
                )  # fmt: skip
                button = gr.Button("Segment", variant="primary", elem_id="segment")
                opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Opacity", elem_id="opacity")
                threshold = gr.Slider(
                    0, 1, 0, step=0.01, label="Background", elem_id="threshold",
                    info="Pixels less similar than this to every word are background; 0: none are.",
                )  # fmt: skip
            with gr.Column():
                result = gr.Image(
                    label="Segmentation", format="png", height=380, elem_id="result",
                    buttons=["download", "fullscreen"], interactive=False,
                )  # fmt: skip
                legend = gr.HighlightedText(
                    label="Click a word for its similarity", elem_id="legend",
                    show_legend=False, show_inline_category=False,
                )  # fmt: skip
                download = gr.DownloadButton(
                    "Label map (PNG)", interactive=False, elem_id="download", size="sm"
                )
                similarity = gr.Image(
                    label="Similarity", format="png", height=380, elem_id="similarity",
                    buttons=["download", "fullscreen"], interactive=False, visible=False,
                )  # fmt: skip
        if examples:
            gr.Examples([[str(path)] for path in examples], [upload], label="Examples")

        inputs = [upload, typed, opacity, threshold]
        outputs = [result, legend, download, similarity]
        together: dict[str, Any] = {"concurrency_limit": _AT_ONCE, "concurrency_id": "answers"}
        show = _messages(functools.partial(_show, answers, with_note=True))
        for event in (button.click, typed.submit):
            event(show, inputs, outputs, api_name="segment", **together)
        again = _messages(lambda path, *given: _show(answers, path, *given) if path else _nothing())
        hidden: dict[str, Any] = {"api_visibility": "private", **together}
        upload.change(again, inputs, outputs, **hidden)
        for slider in (opacity, threshold):  # while it slides, as often as there is an answer
            slider.change(again, inputs, outputs, trigger_mode="always_last", **hidden)

        def clicked(event: gr.SelectData, path: str | None) -> Any:
            return _similarity(answers, path, event.value[1])

        legend.select(_messages(clicked), [upload], [similarity], **hidden)
    return page


_LARGEST = 1_000_000  # bytes of a request that is no upload: words, numbers and names of files


class _TooLarge(Exception):
    """A request is larger than any that the page sends."""


class _Gate:
    """Answers requests to known hosts only, and in a sentence those that no page would send."""

    def __init__(self, app: ASGIApp, names: frozenset[str]):
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._names and scope["type"] in ("http", "websocket"):
            given = Headers(scope=scope)
            hosts = [given.get("host", ""), *given.getlist("x-forwarded-host")]
            if unknown := [name for name in map(host_of, hosts) if name not in self._names]:
                text = f"This page is not called {unknown[0]!r}: see --names."
                await PlainTextResponse(text, 421)(scope, receive, send)
                return
        begun, size = False, 0
        bounded = not scope.get("path", "").endswith("/upload")  # those have a bound of their own

        async def receiving() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if bounded and size > _LARGEST:
                raise _TooLarge
            return message

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        except Exception as error:
            if scope["type"] != "http":
                raise
            status, text = _refusal(error)
            if not begun:
                await PlainTextResponse(text, status)(scope, receive, send)


def _refusal(error: Exception) -> tuple[int, str]:
    """Status and text for a visitor whose request has failed; the log gets a line, or more.

    Gradio takes what it is sent for what its own page sends, so most of them are the visitor's.
    """
    if isinstance(error, _TooLarge):
        print(f"A request of more than {_LARGEST:,} bytes was refused.", file=sys.stderr)
        return 413, f"A request to this page has up to {_LARGEST:,} bytes."
    if machine.error_of(error, by_words=False):
        print(f"A request could not be answered. {machine.sentence(error)}", file=sys.stderr)
        return 507, "This server is short of room or memory. Try again later."
    frames = traceback.extract_tb(error.__traceback__)
    if Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1]):  # a fault of ours
        traceback.print_exception(error)
        return 500, "The page has failed; its log says why."
    print(f"A request was refused ({type(error).__name__}).", file=sys.stderr)
    return 400, "This is not a request of this page."


def gate(names: frozenset[str]) -> Middleware:
    """What refuses requests to other hosts than these; to none, where there are no names."""
    return Middleware(_Gate, names=names)


def _nothing() -> tuple[Any, ...]:
    """The page without an image."""
    return None, None, gr.DownloadButton(value=None, interactive=False), _hidden()


def _hidden() -> gr.Image:
    """No similarity map, until a word is clicked: what was there is of another picture."""
    return gr.Image(None, visible=False)


def _show(
    answers: Answers,
    path: str | None,
    words: str | None,
    opacity: float,
    threshold: float,
    with_note: bool = False,
) -> tuple[np.ndarray, Any, Any, Any]:
    """Values of the picture, the legend, the label map to download, and no similarity."""
    found = answers.segment(path, words or "", opacity, threshold)
    if with_note and found.note:  # not each time that a slider moves
        gr.Info(found.note)
    named: list[tuple[str, str | float | None]] = [
        (f"{word} {percent(share)}", word) for word, share in found.shares.items()
    ]
    if found.background:
        name = unlike("background", list(found.shares))
        named.append((f"{name} {percent(found.background)}", _BACKGROUND))
    grey = {_BACKGROUND: "#" + bytes(UNLABELLED).hex()}
    return (
        found.picture,
        gr.HighlightedText(named, color_map=found.colours | grey),
        gr.DownloadButton(value=found.file, interactive=True),
        _hidden(),
    )


def _similarity(answers: Answers, path: str | None, word: str) -> Any:
    if word == _BACKGROUND:
        raise UserError("The background has no similarity of its own: click a word.")
    picture, low, high = answers.similarity(path, word)
    label = f"“{word}”: {low:.2f} (dark) to {high:.2f}"
    return gr.Image(picture, label=label, visible=True)


def _messages(answer: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with errors of the user shown as messages on the page."""

    @functools.wraps(answer)
    def answered(*given: Any) -> Any:
        try:
            return answer(*given)
        except UserError as error:
            # The browser takes it for HTML, and words in it may be anybody's.
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    return answered
