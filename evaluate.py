"""Scores models: `python evaluate.py --config=FILE --workdir=DIR`. It is fmbseg_jax/evaluate.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("fmbseg_jax.evaluate", run_name="__main__", alter_sys=True)
