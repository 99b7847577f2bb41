"""What an experiment is: its fields, what they may be, where config files are found."""

from fmbseg_jax.config.schema import (
    Config,
    Data,
    Eval,
    Features,
    Label,
    Models,
    Sam,
    Train,
    flatten,
    resolve,
    unflatten,
)

__all__ = [
    "Config",
    "Data",
    "Eval",
    "Features",
    "Label",
    "Models",
    "Sam",
    "Train",
    "flatten",
    "resolve",
    "unflatten",
]
