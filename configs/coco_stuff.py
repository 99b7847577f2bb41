"""The paper's setting (section 4.1): COCO-Stuff's 118,287 images, ViT-L/14 encoders, SAM ViT-H.

    python -m labelling           --config=configs/coco_stuff.py --workdir=work/coco_stuff
    python -m fmbseg_jax.features --config=configs/coco_stuff.py --workdir=work/coco_stuff
    python train.py               --config=configs/coco_stuff.py --workdir=work/coco_stuff

Images: data/coco/train2017. Words: the 171 of COCO-Stuff. SAM: sam_vit_h_4b8939.pth from
segment-anything's page. The paper reports 29.88 mIoU on COCO-Stuff; the balance of the loss and the
temperature are ours (docs/method.md). Not run by us yet; docs/reproduce.md has every command of the
paper's tables, and what each takes.
"""

from fmbseg_jax.config import Config
from fmbseg_jax.datasets import published


def get_config() -> Config:
    config = Config()
    config.data.images = "data/coco/train2017"
    config.data.words = str(published.NAMES / "coco_stuff171.txt")
    return config
