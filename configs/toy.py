"""The embedded default: generated scenes and tiny encoders; everything offline, minutes on a CPU.

make demo
"""

from fmbseg_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.data.images = "data/toy/train/images"
    config.data.words = "data/toy/train/words.txt"

    config.models.clip = "toyworld/weights/clip"
    config.models.sam = "toyworld/weights/sam.pth"
    config.models.vision = "toyworld/weights/dinov2"

    # The tiny encoders see 64 px (CLIP) and 128 px (SAM), in patches of 8. Scenes have 128 px:
    # drawn twice as large, the crops of 64 are small enough to hold one thing at a time.
    config.label.short_side = 256
    config.label.crop = 64
    config.label.stride = 32
    config.label.images_per_shard = 50
    config.label.sam.points_per_side = 12
    config.label.sam.points_per_batch = 24
    config.label.sam.pred_iou = 0.6
    config.label.sam.stability = 0.7

    config.features.size = 256

    # Chosen on the validation scenes. The block, the paper's best, comes second here: it has more
    # to learn than a few hundred steps on so few scenes give it.
    config.train.aligner = "mlp"
    config.train.heads = 2
    config.train.peak_lr = 0.3  # by benchmarks/sweep.py
    config.train.checkpoint_every = 100

    config.eval.folder = "data/toy/test"
    config.eval.short_side = 256
    config.eval.window = 256
    config.eval.stride = 128
    return config
