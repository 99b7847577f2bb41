"""Trains the aligner: `python train.py --config=FILE --workdir=DIR`. It is fmbseg_jax/train.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("fmbseg_jax.train", run_name="__main__", alter_sys=True)
