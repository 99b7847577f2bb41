"""COCO-Stuff with base-size encoders, for one small GPU. As configs/coco_stuff.py otherwise.

python -m labelling --config=configs/coco_stuff_base.py --workdir=work/coco_stuff_base
"""

from configs.coco_stuff import get_config as paper
from fmbseg_jax.config import Config


def get_config() -> Config:
    config = paper()
    config.models.clip = "openai/clip-vit-base-patch16"
    config.models.sam = "sam_vit_b_01ec64.pth"
    config.models.vision = "facebook/dinov2-base"
    config.train.heads = 12
    return config
