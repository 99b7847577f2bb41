"""Your images and your words, without a label: the way of the paper's water example (Figure 5).

    python -m labelling --config=configs/folder.py --workdir=work/mine
    python -m fmbseg_jax.features --config=configs/folder.py --workdir=work/mine
    python train.py --config=configs/folder.py --workdir=work/mine

The images are in photos/, the words, one a line, in words.txt; --images and --words name others.
Base-size models, which a small GPU holds and a patient CPU runs. Fetch SAM's checkpoint once
(sam_vit_b_01ec64.pth, 375 MB, from segment-anything's page); CLIP and DINOv2 come from the Hugging
Face hub by themselves.
"""

from fmbseg_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.data.images = "photos"
    config.data.words = "words.txt"

    config.models.clip = "openai/clip-vit-base-patch16"
    config.models.sam = "sam_vit_b_01ec64.pth"
    config.models.vision = "facebook/dinov2-base"

    config.label.images_per_shard = 50
    config.train.heads = 12
    config.train.checkpoint_every = 100
    return config
