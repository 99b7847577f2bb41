"""Questions that no page would ask, thousands of them with ATTACK=25, to a real server."""

import http.client
import json
import math
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from models import photograph, save_aligner
from PIL import Image
from test_attacks import TIMES
from visitors import ask, served, uploaded

QUESTIONS = 65
_HANG = 30  # s
SECRET = b"a secret of the server"


class Attack:
    """Draws requests, from a seed."""

    def __init__(self, place: str, private: Path, pipe: Path, uploads: Path):
        self._drawn = random.Random(0)
        self._paths = [
            place, str(private), f"{private}.png", str(pipe), "/etc/passwd", str(uploads),
            f"{uploads}/../private", f"{uploads}/link.png", f"{place}\0x", "../" * 8 + "etc/passwd",
            "file:///etc/passwd", "http://127.0.0.1:9/", "data:image/png;base64,aaaa", "", "~root",
            "x" * 5000, "/dev/zero", "/proc/self/environ", None, 5, ["a"], {"a": 1},
        ]  # fmt: skip
        self._words = [
            "sky", "sky, grass", "a;b;c,d", "sky\nsea", "(background),background;bg", "🙂🙂", "",
            "  ,, ", "<img src=x onerror=alert(1)>", "\x1b[2J", "é" * 100, "x" * 300, "a," * 600,
            "a;" * 600, "\ud800", "\0", "x" * 200_000, None, 7, ["sky"], {"a": "b"},
        ]  # fmt: skip
        self._numbers = [0, 1, 0.5, -1, 2, math.nan, math.inf, 1e308, "0.5", "x", None, [], True]

    def request(self) -> tuple[str, bytes | None]:
        """Path and body."""
        return self._drawn.choice([self._call, self._call, self._call, self._get, self._raw])()

    def _image(self, path):
        meta = {"meta": {"_type": "gradio.FileData"}}
        return self._drawn.choice(
            [{"path": path}, {"path": path}, {"path": path, **meta}, path, [{"path": path}],
             {"path": path, "url": "http://127.0.0.1:9/", **meta}, {"url": path, **meta}]
        )  # fmt: skip

    def _one(self, values, usual=0.75):
        """The first, which is a usual one, or any."""
        return values[0] if self._drawn.random() < usual else self._drawn.choice(values)

    def _call(self):
        given = [self._image(self._one(self._paths)), self._one(self._words)]
        given += [self._one(self._numbers), self._one(self._numbers)]
        given = self._one([given, given[:2], None, {}, "x", [], given * 2], 0.9)
        name = self._one(["segment", "answered", "_similarity", "predict"], 0.8)
        return f"/gradio_api/call/{name}", json.dumps({"data": given}).encode()

    def _get(self):
        address = self._drawn.choice(
            ["gradio_api/file=", "file=", "gradio_api/proxy=", "gradio_api/stream/", "static/",
             "assets/", "gradio_api/upload_progress?upload_id=", "gradio_api/call/segment/"]
        )  # fmt: skip
        return f"/{address}{urllib.parse.quote(str(self._drawn.choice(self._paths[:-4])))}", None

    def _raw(self):
        address = self._drawn.choice(["call/segment", "queue/join", "run/predict", "upload"])
        body = self._drawn.choice(
            [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"data":' + b"[" * 5000]
            + [self._drawn.randbytes(200)]
        )  # fmt: skip
        return f"/gradio_api/{address}", body


def answer(address: str, path: str, body: bytes | None) -> tuple[int, bytes]:
    """Status, and what came; of what never ends, its beginning."""
    url = f"{address.rstrip('/')}{path}"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_HANG) as found:
            return found.status, found.read(1 << 16)
    except http.client.IncompleteRead as cut:  # a stream of events about nothing
        return 200, cut.partial
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read()


@pytest.fixture(scope="module")
def export(world, tmp_path_factory):
    return save_aligner(tmp_path_factory.mktemp("attacked") / "export", world.root)


def test_no_question_harms_the_page_or_shows_what_is_not_the_visitors(export, tmp_path, report):
    photo, private = tmp_path / "photo.png", tmp_path / "private"
    Image.fromarray(photograph(90, 120)).save(photo)
    private.write_bytes(SECRET)
    Image.fromarray(np.full((40, 60, 3), 77, np.uint8)).save(f"{private}.png")
    os.mkfifo(tmp_path / "pipe.png")
    output = []
    with served(f"--model={export}", "--max_megapixels=1", output=output) as address:
        place = uploaded(address, photo)
        uploads = Path(place).parent.parent
        (uploads / "link.png").symlink_to(f"{private}.png")
        attack = Attack(place, private, tmp_path / "pipe.png", uploads)
        answered = 0
        for _ in range(QUESTIONS * TIMES):
            path, body = attack.request()
            begun = time.monotonic()
            status, data = answer(address, path, body)
            if status == 200 and "/call/" in path and body:
                status, data = answer(address, f"{path}/{json.loads(data)['event_id']}", None)
                answered += b"event: complete" in data
            assert time.monotonic() - begun < _HANG, (path, body)
            assert status != 500, (path, body)
            assert SECRET not in data and b"root:" not in data, (path, body)
            if b"event: complete" in data:  # nobody's picture but the visitor's
                assert b'"path": "' + os.fsencode(uploads) in data
        assert answered > 2
        assert ask(address, place, "sky")[0] == "complete"
    assert "fmbseg_jax/" not in output[0], output[0]  # no traceback through a line of ours
    report["questions to the page"] = QUESTIONS * TIMES
