"""The web page at work, and what its visitors do without a browser."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import threading
import urllib.request

from conftest import start


@contextlib.contextmanager
def served(*arguments, end_by=signal.SIGTERM, output=None, **environment):
    """The program at work; yields the address that it prints.

    What it prints after that, and how it ends, is appended to `output`.
    """
    command = ("fmbseg_jax.app", *arguments)
    process = start(*command, stdout=subprocess.PIPE, fresh=True, **environment)
    try:
        said = ""
        while not (found := re.search(r"http://\S+", said)):
            line = process.stdout.readline()
            assert line, f"the program ended: {said}"
            said += line
        rest = []  # read all the time: else the program would wait until it may write on
        reader = threading.Thread(target=lambda: rest.append(process.stdout.read()))
        reader.start()
        yield found[0]
    finally:
        process.send_signal(end_by)
        process.wait(timeout=600)
        reader.join()
        if output is not None:
            output += [rest[0], process.returncode]


def ask(address, path, words, name="segment", **headers):
    """What the page's interface answers, as a program gets it: (event, data)."""
    given = [{"path": str(path)}, words, 0, 0]
    url = f"{address.rstrip('/')}/gradio_api/call/{name}"
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(url, json.dumps({"data": given}).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    request = urllib.request.Request(f"{url}/{event}", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read().decode()
    return re.search(r"event: (\w+)\ndata: (.*)", text).groups()


def uploaded(address, path):
    """Where the page has put a file that a visitor gives it."""
    border = "border0"
    body = (
        f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode() + path.read_bytes() + f"\r\n--{border}--\r\n".encode()  # fmt: skip
    headers = {"Content-Type": f"multipart/form-data; boundary={border}"}
    url = f"{address.rstrip('/')}/gradio_api/upload"
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
        return json.load(answer)[0]
