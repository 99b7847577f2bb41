"""What every program shares: its flags, and errors shown as messages.

CONFIG, WORKDIR = program.define_config()

def main() -> None: ...

if __name__ == "__main__":
    program.run(main)
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from fmbseg_jax import config as config_lib
from fmbseg_jax.config import files
from fmbseg_jax.errors import Notice, UserError
from fmbseg_jax.io import machine
from fmbseg_jax.io.spelling import printable
from fmbseg_jax.runs import extras, home, system  # noqa: F401 - on Windows, programs end here


def define_config(workdir_required: bool = True) -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """Defines --config=FILE (with --config.SECTION.FIELD=VALUE) and --workdir=DIR."""
    config = config_flags.DEFINE_config_file(
        "config",
        help_string="The experiment: a file of yours, or configs/folder.py and others that come "
        "with the package. Fields are set by --config.SECTION.FIELD=VALUE; `fmbseg config` shows "
        "all of them.",
    )
    default = None if workdir_required else ""  # None: it has to be given
    return config, flags.DEFINE_string("workdir", default, "Where the results go; made if needed.")


def define_model() -> None:
    """Defines --model=EXPORT, and where its encoders are."""
    flags.DEFINE_string("model", "", "Exported aligner: an export/ folder, or a hub id[@REVISION].")
    flags.DEFINE_string("vision", "", "Where its vision encoder is now, if that has moved.")
    flags.DEFINE_string("clip", "", "Where its CLIP is now, if that has moved.")


def require(*names: str) -> None:
    """Raises UserError, with an example, where one of these flags is empty."""
    for name in names:
        if not flags.FLAGS[name].value:
            raise UserError(_missing(name))


def define_hosts() -> tuple[flags.FlagHolder, flags.FlagHolder, flags.FlagHolder]:
    """Defines --coordinator, --processes and --process, for programs on several hosts."""
    return (
        flags.DEFINE_string(
            "coordinator",
            "",
            "HOST:PORT of process 0, where several hosts work together. On a TPU pod, by SLURM's "
            "srun or Open MPI's mpirun none of the three flags is needed.",
        ),
        flags.DEFINE_integer("processes", 0, "How many processes there are, on all hosts."),
        flags.DEFINE_integer("process", -1, "Which of them this is, from 0."),
    )


def run(main: Callable[[], None]) -> None:
    """Parses the flags, calls `main`; a UserError or Ctrl-C ends in a message, not a traceback."""

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise UserError(f"Unexpected argument {arguments[1]!r}: flags are --NAME=VALUE.")
        if not any("-verbosity" in argument for argument in sys.argv):
            logging.set_verbosity(logging.WARNING)  # Orbax and tfds tell much at INFO
        main()

    home.provide()
    for stream in (sys.stdout, sys.stderr):  # words of any alphabet, also where it is ASCII's
        with contextlib.suppress(OSError, AttributeError):  # a stream of another kind
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    _show_notices_plainly()
    _hush_what_was_left()
    for flag in flags.FLAGS.get_flags_for_module(__name__):  # --help shows the program's own
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    try:
        app.run(guarded, flags_parser=_parse_flags)
    except SystemExit:
        if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
            sys.exit(0)  # absl's own ends with 1
        raise
    except UserError as error:
        sys.exit(f"\nerror: {_shown(error)}")
    except ModuleNotFoundError as error:
        sys.exit(extras.missing(error))
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command to continue.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        told = _shown(machine.sentence(error))
        if not told:
            raise
        sys.exit(f"\nerror: {told} Then run the same command to continue.")


def _show_notices_plainly() -> None:
    """Has Python show a notice as a line of its own, without the place in the code."""
    usual = warnings.formatwarning

    def plainly(message: Any, category: type[Warning], *place: Any, **line: Any) -> str:
        if issubclass(category, Notice):
            return f"\n{_shown(message)}\n"  # a progress bar may stand in this line
        return usual(message, category, *place, **line)

    warnings.formatwarning = plainly


def _shown(message: Any) -> str:
    """A message for a terminal: what it quotes may be of anybody."""
    return "\n".join(printable(line) for line in str(message).split("\n"))


def _hush_what_was_left() -> None:
    """Keeps Python from reporting what is left of a save or read whose error is reported anyway.

    tensorstore's threads report each array to an event loop that is closed, Orbax leaves the
    coroutines of the other arrays, and asyncio a loop for which no file could be opened.
    """
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        orbax = code is not None and "orbax" in code.co_filename
        loop = getattr(unraisable.object, "__qualname__", "") == "BaseEventLoop.__del__"
        if not (orbax or loop or str(unraisable.exc_value) == "Event loop is closed"):
            usual(unraisable)

    sys.unraisablehook = hook


def example() -> str:
    """The first example command of the program that runs: what is indented in its docstring."""
    text = sys.modules["__main__"].__doc__ or ""
    return next((line for line in text.splitlines() if line.startswith("    ")), "")


_PLAINLY = {
    r"invalid literal for int\(\) with base 10: (.*)": r"\1 is no integer.",
    r"could not convert string to float: (.*)": r"\1 is no number.",
    r"\('Non-boolean argument to boolean flag', (.*)\)": r"\1 is neither true nor false.",
}
"""What absl says of a wrong value in Python's words, and what we say."""


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        if "config" in flags.FLAGS:
            arguments = files.resolve(arguments)
        rest = flags.FLAGS(arguments)
        for name in ("config", "workdir"):
            if name in flags.FLAGS and flags.FLAGS[name].value is None:
                raise UserError(_missing(name))
        if "config" in flags.FLAGS:
            flags.FLAGS.config.validate()
    except BrokenPipeError:  # `--help | head`: nobody reads on
        os._exit(0)
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(error.flagname)) from None
    except flags.Error as error:
        text = str(error).removeprefix("flag ")
        for theirs, ours in _PLAINLY.items():
            text = re.sub(theirs, ours, text)
        raise UserError(text) from None
    except (KeyError, AttributeError) as error:  # ml_collections, of a field that does not exist
        raise UserError(_unknown_field(arguments) or str(error)) from None
    return rest


def _missing(name: str) -> str:
    return f"--{name} is missing. For example:\n\n{example()}"


def _unknown_flag(name: str) -> str:
    if name.startswith("config.") and "config" in flags.FLAGS:
        return _missing("config")  # its fields are flags only once it is read
    known = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    if "config" in flags.FLAGS:
        known += [f"config.{field}" for field in config_lib.flatten(config_lib.Config())]
    near = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean --{near[0]}?" if near else ""
    return f"There is no flag --{name}.{hint} --help shows all."


_NO_ACCUMULATION = (
    "Gradients are not accumulated over smaller batches: the loss compares every patch with every "
    "other of its batch, and the pairs between the smaller ones would be missing. To save memory "
    "set --config.train.images_per_pass, which leaves loss and gradient exactly as they are, or "
    "--config.train.patches_per_image."
)


def _unknown_field(arguments: list[str]) -> str | None:
    known: dict[str, Any] = config_lib.flatten(config_lib.Config())
    for argument in arguments:
        match = re.match(r"--?config\.([\w.]+)", argument)
        if match and match[1] not in known:
            if "accum" in match[1]:
                return _NO_ACCUMULATION
            near = difflib.get_close_matches(match[1], known, 1)
            hint = f" Did you mean --config.{near[0]}?" if near else ""
            return f"The config has no field {match[1]!r}.{hint} `fmbseg config` shows all."
    return None
