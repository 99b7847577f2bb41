"""SHA-256 of files that are published under names of their own, and what bears such a name.

A file that was cut short, damaged or replaced on its way is told before anything is learnt from it.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from tqdm import tqdm

from fmbseg_jax.errors import UserError

SHA256 = {
    "sam_vit_b_01ec64.pth": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam_vit_l_0b3195.pth": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam_vit_h_4b8939.pth": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    "dinov2_vits14_pretrain.pth": (
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"
    ),
    "dinov2_vitb14_pretrain.pth": (
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"
    ),
    "dinov2_vitl14_pretrain.pth": (
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
    ),
    "dinov2_vitg14_pretrain.pth": (
        "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3"
    ),
    "dinov2_vitb14_reg4_pretrain.pth": (
        "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71"
    ),
    "dinov2_vitl14_reg4_pretrain.pth": (
        "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51"
    ),
    "dinov2_vitg14_reg4_pretrain.pth": (
        "746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283"
    ),
}
"""By name: Meta's SAM, whose names end in digits of their MD5, and torch.hub's DINOv2."""


def check(path: Path) -> None:
    """Raises UserError where a file has the name of a published one, and is another."""
    published = SHA256.get(path.name)
    if not published:
        return
    status = path.stat()
    if _sum(path.absolute(), status.st_size, status.st_mtime_ns) != published:
        raise UserError(
            f"{path} is not the file that is published as {path.name}: its SHA-256 is another than "
            f"{published}. Fetch it again; a model of your own needs another name."
        )


@functools.cache  # a program asks more than once, of gigabytes
def _sum(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, as long as its size and time of change are these."""
    digest = hashlib.sha256()
    with (
        open(path, "rb") as file,
        tqdm(total=size, desc=f"Checking {path.name}", unit="B", unit_scale=True, delay=1) as bar,
    ):
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
