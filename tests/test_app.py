"""The web page in a real browser: what people do, what they do wrong, several of them at once."""

import contextlib
import errno
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from models import save_aligner
from PIL import Image
from visitors import ask, served, uploaded

import fmbseg_jax
from fmbseg_jax.data import images, label_maps
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE
from fmbseg_jax.web import listening, visits
from fmbseg_jax.web.answers import Answer, Answers, split

BROWSERS = "chromium", "chromium-browser", "google-chrome"
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"needs a browser: one of {', '.join(BROWSERS)} (apt install chromium)"
)
OFFLINE = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@pytest.fixture(scope="module")
def export(world, tmp_path_factory):
    return save_aligner(tmp_path_factory.mktemp("app") / "export", world.root)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    coarse = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(images.resize(coarse, (90, 120))).save(path)
    return path


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=OFFLINE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(export, photo):
    limits = ["--max_megabytes=1", "--max_megapixels=1"]
    with served(f"--model={export}", f"--examples={photo.parent}", *limits) as address:
        yield address


@pytest.fixture
def page(browser, address):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    page.wait_for_selector("#segment")
    yield page
    page.close()


def upload(page, path):
    page.set_input_files("#image input[type=file]", path)


def picture(page, where):
    """The pixels of a picture on the page, once it is there."""
    source = page.locator(f"#{where} img").get_attribute("src")
    data = page.request.get(source).body()
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def message(page):
    """What the page says is wrong."""
    toast = page.locator(".toast-body").last
    toast.wait_for()
    return toast.inner_text()


@needs_browser
def test_from_an_image_to_a_label_map(page, export, photo, tmp_path):
    page.fill("#words textarea", "sky, moon, sofa;couch")
    upload(page, photo)
    page.wait_for_selector("#result img")
    image, words = images.decode(photo.read_bytes()), ["sky", "moon", "sofa;couch"]
    assert picture(page, "result").shape == image.shape
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "labels.png")
    segmenter = fmbseg_jax.load(export)
    expected = segmenter.segment(image, words)
    found = label_maps.read(tmp_path / "labels.png", 3)
    np.testing.assert_array_equal(found, expected)

    legend = page.locator("#legend .token")
    assert legend.count() == 3
    largest = words[np.bincount(expected.ravel(), minlength=3).argmax()]
    assert re.fullmatch(rf"{largest} \d+ %", legend.first.inner_text())
    legend.first.click()
    page.wait_for_selector("#similarity img")
    heat = picture(page, "similarity").astype(float).mean(-1)
    similarity = segmenter.similarities(image, [largest])[..., 0]
    assert np.corrcoef(heat.ravel(), similarity.ravel())[0, 1] > 0.5
    label = page.locator("#similarity label").first.inner_text()
    assert f"{similarity.min():.2f} (dark) to {similarity.max():.2f}" in label

    before = page.locator("#result img").get_attribute("src")
    page.fill("#words textarea", "sky, moon, grass")
    page.press("#words textarea", "Enter")
    page.wait_for_function(f"document.querySelector('#result img').src != '{before}'")
    assert "grass" in " ".join(legend.all_inner_texts())


@needs_browser
def test_sliders_and_examples(page, photo):
    page.fill("#words textarea", "sky, moon")
    page.locator(".gallery-item, .gallery button").first.click()
    page.wait_for_selector("#result img")

    def slide(where, value):
        before = page.locator("#result img").get_attribute("src")
        box = page.locator(f"#{where} input[type=number]")
        box.fill(str(value))
        box.press("Enter")
        box.blur()
        page.wait_for_function(f"document.querySelector('#result img').src != '{before}'")

    slide("opacity", 0)
    image = images.decode(photo.read_bytes())
    same = np.all(picture(page, "result") == image, axis=-1)
    assert same.mean() > 0.8  # all but the lines between words
    slide("opacity", 1)
    assert len(np.unique(picture(page, "result").reshape(-1, 3), axis=0)) <= 6
    slide("threshold", 0.99)
    page.wait_for_selector("text=background 100 %")
    page.locator("#legend .token").last.click()
    assert "click a word" in message(page)


@needs_browser
def test_wrong_input_gets_a_message(page, photo, tmp_path):
    page.click("#segment")
    assert "Drop an image on the page first" in message(page)
    (tmp_path / "fake.png").write_text("no image")
    upload(page, tmp_path / "fake.png")
    page.wait_for_selector("text=not an image file, or damaged at its start. Try a JPEG or PNG.")
    page.reload()
    page.wait_for_selector("#segment")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")  # 900 megapixels in 110 kB
    upload(page, tmp_path / "bomb.png")
    page.wait_for_selector("text=has 30000 x 30000 pixels; this page takes up to 1 million")
    assert "/tmp" not in page.locator("body").inner_text()
    for words, expected in {
        "sky, Sky": "'Sky', is word 1 again",
        " , ,": "Type some words, separated by commas",
        ",".join(map(str, range(501))): "These are 501 words",
    }.items():
        page.reload()
        page.wait_for_selector("#segment")
        upload(page, photo)
        page.wait_for_selector("#result img")
        page.fill("#words textarea", words)
        page.click("#segment")
        page.wait_for_selector(f"text={expected}")
    assert "Traceback" not in page.content()


@needs_browser
def test_uploads_are_limited(page, tmp_path):
    Image.new("RGB", (1500, 900), "red").save(tmp_path / "wide.png")  # 1.35 megapixels, 4 kB
    upload(page, tmp_path / "wide.png")
    page.wait_for_selector("text=has 1500 x 900 pixels; this page takes up to 1 million")
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")  # 1.5 MB
    page.reload()
    page.wait_for_selector("#segment")
    upload(page, tmp_path / "noise.png")
    assert "size" in message(page).lower()
    assert page.locator("#result img").count() == 0


@needs_browser
def test_the_page_needs_nothing_from_elsewhere(browser, address):
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#segment")
    page.close()
    scripts = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert scripts == []


def test_it_listens_to_this_machine_alone(address):
    host, port = re.fullmatch(r"http://([\d.]+):(\d+)/?", address).groups()
    assert host == "127.0.0.1"
    with open("/proc/net/tcp") as table:
        listening = [line.split()[1] for line in table.readlines()[1:] if line.split()[3] == "0A"]
    assert [a for a in listening if int(a.split(":")[1], 16) == int(port)] == [
        f"0100007F:{int(port):04X}"
    ]


@needs_browser
def test_people_do_not_wait_for_each_other(browser, photo, tmp_path):
    """Two questions are answered only when both are being worked on at once."""
    from fmbseg_jax.web import page as pages

    both = threading.Barrier(2)

    class Slow(Answers):
        def segment(self, *given):
            both.wait(timeout=300)
            return super().segment(*given)

    class Constant:
        reading = images.USUAL

        def segment(self, image, words, background):
            return np.zeros(image.shape[:2], np.int32)

    blocks = pages.build(Slow(Constant(), Path("/"), tmp_path), ["sky"], [], "")
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        visitors = [browser.new_page() for _ in range(2)]
        for visitor in visitors:
            visitor.goto(address)
            visitor.wait_for_selector("#segment")
        for visitor in visitors:
            upload(visitor, photo)
        for visitor in visitors:
            visitor.wait_for_selector("#result img")
            visitor.close()
    finally:
        blocks.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_behind(export, tmp_path, monkeypatch, number):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    with served(f"--model={export}", end_by=number):
        assert list((tmp_path / "tmp").glob("fmbseg_page_*"))
    assert not list((tmp_path / "tmp").glob("fmbseg_page_*"))


def test_answers(export, photo, tmp_path):
    segmenter = fmbseg_jax.load(export, {"max_megapixels": 1})
    answers = Answers(segmenter, tmp_path, tmp_path / "private")
    photo = Path(shutil.copy(photo, tmp_path))
    image = images.decode(photo.read_bytes())
    found = answers.segment(str(photo), "sky\nmoon,", 0.5, 0.0)
    assert found.picture.shape == image.shape
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.background == 0
    assert list(found.shares.values()) == sorted(found.shares.values(), reverse=True)
    assert set(found.colours) == {"sky", "moon"}
    all_background = answers.segment(str(photo), "sky", 0.5, 0.999)
    assert all_background.background == 1
    assert np.all(label_maps.read(all_background.file, 1) == IGNORE)
    assert split("a, b\n c;d ,,") == ("a", "b", "c;d")
    assert not found.note
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)).save(tmp_path / "deep.png")
    deep = answers.segment(str(tmp_path / "deep.png"), "sky", 0, 0.0)
    assert deep.note.startswith("1 image, deep.png, has more than 8 bits a channel")
    assert "--deep=type scales by" in deep.note
    assert deep.picture.min() == 0 and deep.picture.max() == 255
    bomb = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(bomb)  # 900 megapixels in 110 kB
    with pytest.raises(UserError, match="takes up to 1 million"):
        answers.segment(str(bomb), "sky", 0.5, 0.0)


def test_a_word_that_is_called_background(photo):
    """In the legend it stands beside what has no word, with another name and another color."""
    from fmbseg_jax.web import page

    shares = {"background": 0.5, "sky": 0.25}
    colours = dict.fromkeys(shares, "#000000")
    found = Answer(np.zeros((2, 2, 3), np.uint8), shares, 0.25, colours, photo)

    class Fixed:
        segment = staticmethod(lambda *given: found)

    _, legend, _, _ = page._show(Fixed(), "a.png", "background,sky", 0.5, 0.5)
    entries = legend.value if isinstance(legend.value, list) else legend.value.model_dump()
    texts, kinds = zip(
        *((one["token"], one["class_or_confidence"]) for one in entries), strict=True
    )
    assert texts == ("background 50 %", "sky 25 %", "background (no word) 25 %")
    assert kinds[:2] == ("background", "sky") and len({*kinds}) == 3
    assert {*kinds} <= {*legend.color_map}
    with pytest.raises(UserError, match="The background has no similarity of its own"):
        page._similarity(Fixed(), "a.png", kinds[2])


def test_a_visitor_gets_no_file_of_the_server(address, photo, tmp_path):
    place = uploaded(address, photo)
    event, data = ask(address, place, "sky")
    assert event == "complete"
    assert "image.png" in data
    served_folder = Path(place).parent.parent
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "picture.png").symlink_to(photo)
    for path in (
        photo, tmp_path / "picture.png", tmp_path / "pipe", "/dev/zero", served_folder,
        f"{served_folder}/../../{photo.name}", f"{place}/../../../..{photo}", "", "\0", "x" * 5000,
    ):  # fmt: skip
        event, data = ask(address, path, "sky")
        assert event == "error", path
        assert "image.png" not in data


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1, 1.01, "much", None, [], True])
def test_numbers_that_no_slider_gives_are_refused(wrong, export, photo, tmp_path):
    answers = Answers(fmbseg_jax.load(export), photo.parent, tmp_path)
    with pytest.raises(UserError, match="Opacity is a number from 0 to 1"):
        answers.segment(str(photo), "sky", wrong, 0)
    with pytest.raises(UserError, match="Background is a number from 0 to 1"):
        answers.segment(str(photo), "sky", 0.5, wrong)


def test_what_others_type_cannot_be_asked_for(address, photo):
    """Label maps and features of words lie where the page serves nothing."""
    place = uploaded(address, photo)
    assert ask(address, place, "a secret word")[0] == "complete"
    folder = Path(place).parent.parent.parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    private = [path for path in files if path.is_relative_to(folder / "private")]
    assert private
    assert not [path for path in files if path.suffix == ".feature"]
    for path in private:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address.rstrip('/')}/gradio_api/file={path}", timeout=60)
        assert refused.value.code in (403, 404)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:7860", 200), ("LOCALHOST.", 200), ("[::1]:80", 200),
        ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("", 421), ("[::2]", 421),
    ],
)  # fmt: skip
def test_other_names_of_this_machine_are_refused(address, host, status):
    request = urllib.request.Request(address, headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == status
    except urllib.error.HTTPError as error:
        assert error.code == status


def test_names_that_are_let_in():
    assert not listening.names("0.0.0.0", [])
    known = listening.names("192.168.0.7", ["Water.example"])
    assert known >= {"192.168.0.7", "water.example", "localhost", "::1"}
    assert listening.host_of("Water.EXAMPLE.:80") == "water.example"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (";".join(f"w{i}" for i in range(10_000)), "10000 words, with their synonyms"),
        ("x" * 5_000_000, "5,000,000 letters"),
        ("x" * 300, "has 300 letters; the page takes 200"),
        (",".join(f"w{i}" for i in range(501)), "These are 501 words"),
    ],
)
def test_words_without_measure(words, message):
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        split(words)
    assert time.monotonic() - start < 5


def test_html_in_errors_and_titles_is_text(tmp_path):
    from fmbseg_jax.web import page

    @page._messages
    def fails():
        raise UserError("<img src=http://evil.example>")

    with pytest.raises(Exception, match="&lt;img src=http"):
        fails()

    class Nothing:
        pass

    blocks = page.build(Nothing(), ["<b>sky</b>"], [], "<img src=http://evil.example>")
    assert "<img" not in json.dumps(blocks.get_config_file(), default=str)


def test_a_page_that_was_killed_leaves_nothing_for_ever(export, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    with served(f"--model={export}", end_by=signal.SIGKILL):
        pass
    (left,) = (tmp_path / "tmp").glob("fmbseg_page_*")
    other = tmp_path / "tmp" / re.sub(r"_\d+_\w+$", "_1_alive", left.name)
    other.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    visits.remove_abandoned()
    assert not left.exists()
    assert other.exists(), "process 1 lives"


def test_uploads_that_were_broken_off_go_after_their_time(address, photo):
    """Gradio knows only uploads that have come whole."""
    served_folder = Path(uploaded(address, photo)).parent.parent
    host, port = address.removeprefix("http://").strip("/").split(":")
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9999999\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    )
    with socket.create_connection((host, int(port))) as visitor:
        visitor.sendall(head.encode() + b"half" * 1000)
        while not any(path.is_file() for path in served_folder.iterdir()):
            time.sleep(0.01)
    folders = visits.Folder(served_folder, served_folder.parent / "private")
    visits.remove_old(folders, before=0)
    assert any(path.is_file() for path in served_folder.iterdir())
    visits.remove_old(folders, before=time.time() + 1)
    assert not any(path.is_file() for path in served_folder.iterdir())
    assert any(path.is_dir() for path in served_folder.iterdir())  # what has come whole


def test_a_busy_page_that_is_interrupted_ends_in_peace(export, photo, tmp_path, monkeypatch):
    """While it answers eight visitors: no traceback, and at the next start nothing is left."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    output = []

    def ask_on(address, place, number):
        with contextlib.suppress(OSError, http.client.HTTPException, AttributeError):
            for i in range(100):  # until the page is gone
                ask(address, place, f"word {number} {i}")

    with served(f"--model={export}", end_by=signal.SIGINT, output=output) as address:
        place = uploaded(address, photo)
        visitors = [threading.Thread(target=ask_on, args=(address, place, i)) for i in range(8)]
        for visitor in visitors:
            visitor.start()
        time.sleep(1)
    for visitor in visitors:
        visitor.join(60)
    assert "Traceback" not in output[0], output[0]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    visits.remove_abandoned()
    assert not list((tmp_path / "tmp").glob("fmbseg_page_*"))


@pytest.mark.parametrize(
    ("error", "status", "logged"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/private/a.png"), 507, "Make room."),
        (KeyError("data"), 400, "A request was refused (KeyError)."),
        (OSError(errno.EMFILE, "Too many open files", "/private/a.png"), 507, "Raise the limit"),
    ],
)
def test_a_request_that_fails_gets_a_sentence(error, status, logged, capsys):
    """What the server lacks is not the visitor's fault, and its paths are not the visitor's."""
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    from fmbseg_jax.web import page

    async def failing(scope, receive, send):
        raise error

    app = Starlette(middleware=[page.gate(frozenset())])
    app.router.mount("/", failing)
    answer = TestClient(app).get("/")
    assert answer.status_code == status and "/private" not in answer.text
    told = capsys.readouterr().err
    assert logged in told and "Traceback" not in told


def test_a_request_without_an_end_is_refused(address):
    """By its size, whether it says so or not; of what is typed nothing is in the log."""
    host, port = address.removeprefix("http://").strip("/").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    body = (b"x" * 100_000 for _ in range(1000))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", "/gradio_api/call/segment", body, headers, encode_chunked=True)
        assert connection.getresponse().status in (400, 413)
    assert urllib.request.urlopen(address, timeout=60).status == 200


@pytest.mark.parametrize(
    "header",
    ["[127.0.0.1].evil.com", "[localhost", "[127.0.0.1]evil", "127.0.0.1:7991@evil.com", "a b", ""],
)
def test_a_host_that_is_none_is_not_known(header):
    assert listening.host_of(header) not in listening.names("127.0.0.1", ["page.example"])


def test_a_host_that_a_proxy_names_is_checked_too(address):
    request = urllib.request.Request(address, headers={"X-Forwarded-Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 421


def test_what_is_typed_is_not_logged(export, photo):
    output = []
    with served(f"--model={export}", output=output) as address:
        url = f"{address.rstrip('/')}/gradio_api/call/segment"
        data = json.dumps({"data": [None, "MYSECRETWORD"]}).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        event = json.load(urllib.request.urlopen(request, timeout=60))["event_id"]
        assert b"event: error" in urllib.request.urlopen(f"{url}/{event}", timeout=60).read()
    assert "MYSECRETWORD" not in output[0] and "A request has failed" in output[0]


def test_a_fault_of_ours_is_not_the_visitors(capsys):
    """Wherever it is in the package: the log has all of it."""
    from fmbseg_jax.web import page

    with pytest.raises(TypeError) as failed:
        label_maps.encode(None)
    assert page._refusal(failed.value)[0] == 500
    assert "Traceback" in capsys.readouterr().err


def test_one_look_that_fails_does_not_end_the_sweeper(monkeypatch):
    looks, ended = [], threading.Event()

    def look(*given):
        looks.append(given)
        if len(looks) == 3:
            ended.set()
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(visits, "remove_old", look)
    monkeypatch.setattr(visits, "_EVERY", 0.001)
    visits._sweep(visits.Folder(Path("a"), Path("b")), ended)
    assert len(looks) == 3


def test_app_errors(export, tmp_path):
    def error(*arguments):
        result = run("fmbseg_jax.app", *arguments, check=False)
        assert result.returncode == 1
        assert "Traceback" not in result.stdout
        return result.stdout

    assert "--model is missing" in error()
    assert "is no exported aligner" in error(f"--model={tmp_path}")
    assert "No folder of images at" in error(f"--model={export}", "--examples=nowhere")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "is taken" in error(f"--model={export}", f"--port={port}")
    for host in ("192.0.2.7", "nowhere.invalid"):
        message = error(f"--model={export}", f"--host={host}")
        assert f"--host={host} is no address of this machine (" in message


# Proxies


def test_a_page_behind_proxies_that_do_not_answer(export):
    """As in companies. The address is of IPv6, where there is that."""
    dead = {name: "http://127.0.0.1:9" for name in ("http_proxy", "HTTPS_PROXY")}
    dead |= {"ALL_PROXY": "socks5://127.0.0.1:9", "no_proxy": "example.org"}
    try:
        listening.check_host(host := "::1")
    except UserError:
        host = "localhost"
    with served(f"--model={export}", f"--host={host}", **dead) as address:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert b"FMbSeg" in direct.open(address, timeout=60).read()


def test_what_was_excepted_from_proxies_stays_so(monkeypatch):
    environment = {
        "no_proxy": "example.org, .lan",
        "NO_PROXY": "other.org",
        "https_proxy": "http://p",
    }
    environment |= {"ALL_PROXY": "socks5h://p", "HTTP_PROXY": "http://p", "all_proxy": "SOCKS5://p"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    listening.reach_directly("10.0.0.5", environment)
    excepted = "example.org,.lan,other.org,localhost,127.0.0.1,::1,10.0.0.5"
    assert environment == {
        "no_proxy": excepted, "NO_PROXY": excepted, "https_proxy": "http://p",
        "HTTP_PROXY": "http://p",
    }  # fmt: skip
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    environment = {"ALL_PROXY": "socks5://p"}
    listening.reach_directly("localhost", environment)
    assert environment["ALL_PROXY"] == "socks5://p"
    assert environment["no_proxy"] == "localhost,127.0.0.1,::1"


def test_a_machine_without_ipv6(monkeypatch):
    def none(family, *kind):
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", none)
    with pytest.raises(UserError, match=r"--host=::1 is .* \(this machine has no IPv6, or .*Give"):
        listening.check_host("::1")


def test_hosts_of_this_machine():
    for host in ("127.0.0.1", "0.0.0.0", "localhost"):
        listening.check_host(host)
        assert listening.in_address(host) == host
    assert listening.in_address("::1") == "[::1]"
    with pytest.raises(UserError, match="0.0.0.0 for every machine that reaches it"):
        listening.check_host("198.51.100.1")
