"""Eight CPU devices, and shape annotations that are checked while the tests run."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook  # noqa: E402

_PURE = ["models.transformer", "models.encoders", "models.aligner", "losses"]
_PURE += ["similarity", "sliding", "metrics"]
_hook = install_import_hook([f"fmbseg_jax.{name}" for name in _PURE], "beartype.beartype")
_hook.__enter__()  # for the whole run
