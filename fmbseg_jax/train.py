"""Program: patch features and their labels → a trained aligner (stage 2, paper, section 3.3).

    fmbseg train --config=configs/toy.py --workdir=work/toy
    python train.py --config=FILE --workdir=DIR --config.train.epochs=20

Reads WORKDIR/features (WORKDIR/pseudo_labels, if train.features is "online"); writes
WORKDIR/checkpoints, WORKDIR/metrics (train.jsonl, TensorBoard events) and, at the end,
WORKDIR/export. Run again to continue from the last checkpoint, with the same batches as if never
stopped. SIGTERM and Ctrl-C save one before they end the program. On several hosts: docs/pods.md.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

import jax
from etils import epath

import fmbseg_jax
from fmbseg_jax.config import Config, flatten, resolve
from fmbseg_jax.data.example import read_metadata
from fmbseg_jax.encoders import identity, loading
from fmbseg_jax.encoders.text_features import text_features
from fmbseg_jax.errors import UserError
from fmbseg_jax.io.files import naming
from fmbseg_jax.parallel import agreement, hosts
from fmbseg_jax.parallel.mesh import data_mesh, replicate
from fmbseg_jax.runs import program, workfolder
from fmbseg_jax.sharing import model_json
from fmbseg_jax.sharing.card import model_card
from fmbseg_jax.sharing.exports import Export, load_export, read_model, save_export
from fmbseg_jax.training import loop, step
from fmbseg_jax.training.batches import TrainBatches
from fmbseg_jax.training.data import TrainingData, open_cached, open_online
from fmbseg_jax.training.validation import Validation
from fmbseg_jax.vocabulary import read_templates

CHECKPOINTS = "checkpoints/*[0-9]"
"""Whole ones; a save that was cut short has another ending."""


def train(config: Config, workdir: Path) -> None:
    """Trains the aligner on WORKDIR/features and exports it to WORKDIR/export."""
    mesh = data_mesh()
    online = config.train.features == "online"
    threads = config.features.threads
    data = open_online(config, workdir) if online else open_cached(workdir, threads)
    text = text_features(config.models.clip)
    check_window(config, data.metadata["vision"]["source"])
    template = data.metadata["config"].get("label.template", config.label.template)

    batches = TrainBatches(
        data.count,
        data.read,
        seed=config.seed,
        batch_size=config.train.batch_size,
        epochs=config.train.epochs,
        multiple=mesh.size,
        process=(jax.process_index(), jax.process_count()),
        threads=threads,
    )
    described: dict[str, Any] = {
        "kind": config.train.aligner, "output": text.width,
        "mlp_ratio": config.train.mlp_ratio, "heads": config.train.heads,
    }  # fmt: skip
    model = describe(config, data, described, batches.steps)
    model_json.check(model, workdir / ("pseudo_labels" if online else "features"))
    objective = step.objective(
        config.train, described, batches.steps,
        encoder=data.encoder.module if data.encoder else None, mesh=mesh,
    )  # fmt: skip
    state = step.create_state(objective, config.seed, data.width)
    checkpoints = epath.Path(workdir) / "checkpoints"
    fresh = not workfolder.holds(checkpoints, CHECKPOINTS.split("/")[1])
    if config.train.start_from and fresh:
        state = dataclasses.replace(state, params=start_from(config, model, state.params))
    made_from = checkpoints / "made_from.json"
    advice = "Delete that folder to train afresh, or give another --workdir."
    otherwise = workfolder.unless_changed(made_from, advice)
    before = {} if fresh else workfolder.recorded(made_from, {"clip?": str}, otherwise)
    clip_hash = identity.content_hash(model["clip"]["source"], before.get("clip", ""))
    agreement.by_the_first(
        lambda: workfolder.remember(
            made_from, {"features": data.digest, "clip": clip_hash}, advice, fresh=fresh
        )
    )
    validate = config.train.validate_on and jax.process_index() == 0
    trained = loop.fit(
        replicate(mesh, state),
        batches,
        replicate(mesh, agreement.same_for_all(text(data.metadata["words"], template))),
        replicate(mesh, data.encoder.params if data.encoder else {}),
        objective=objective,
        mesh=mesh,
        config=config.train,
        workdir=workdir,
        validation=Validation(config, model) if validate else None,
    )
    if trained and jax.process_index() == 0:
        model["steps"] = int(trained.step)
        with naming(workdir / "export"):
            save_export(workdir / "export", Export(trained.params, model), model_card(model))
        print(f"The aligner is in {workdir / 'export'} (step {model['steps']} of {batches.steps}).")


def start_from(config: Config, model: dict[str, Any], template: Any) -> Any:
    """Params of the export `train.start_from`; raises UserError where its encoders are others."""
    folder = config.train.start_from
    other = read_model(folder)
    for name in ("vision", "clip"):
        source, ours, recorded = model[name]["source"], model[name]["hash"], other[name]["hash"]
        if not identity.is_one_model(source, ours, recorded):
            raise UserError(
                f"train.start_from={folder} was trained with the {name} encoder "
                f"{other[name]['source']} ({recorded}); here it is "
                f"{model[name]['source']} ({model[name]['hash']}). Use the same."
            )
    return jax.device_get(load_export(folder, template))


def check_window(config: Config, source: str) -> None:
    """Raises UserError where the export could not segment: its windows are cut into patches."""
    try:
        patch = loading.vision_spec(source).patch
    except UserError:  # not an encoder of ours: somebody's own features
        return
    if config.eval.window % patch:
        raise UserError(
            f"eval.window = {config.eval.window} is not a multiple of {patch} pixels, the patch of "
            f"{source}: the aligner could not be used. Give --config.eval.window, short_side and "
            "stride that are."
        )


def describe(
    config: Config, data: TrainingData, aligner: dict[str, Any], steps: int
) -> dict[str, Any]:
    """What model.json of the export holds."""
    known = "source", "hash", "revision"
    vision = {name: value for name, value in data.metadata["vision"].items() if name in known}
    templates = {"eval.template": "\n".join(read_templates(config.eval.template))}
    return {
        "aligner": aligner,
        "vision": vision | {"source": resolve(vision["source"])},
        "clip": identity.describe(resolve(config.models.clip)),
        "words": data.metadata["words"],
        "images": data.count,
        "steps": steps,
        "config": flatten(config) | _of_the_data(data.metadata["config"]) | templates,
        "versions": {
            "fmbseg_jax": fmbseg_jax.__version__, "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def _of_the_data(made: dict[str, Any]) -> dict[str, Any]:
    """What earlier programs recorded of their own stages; training and inference are this one's."""
    ours = ("seed", "train", "eval")
    return {name: value for name, value in made.items() if name.split(".")[0] not in ours}


def main() -> None:
    hosts.start_hosts(*(flag.value for flag in HOSTS))
    config, workdir = CONFIG.value, workfolder.local(WORKDIR.value)
    online = config.train.features == "online"
    read_metadata(workdir / ("pseudo_labels" if online else "features"))  # no folder is made yet
    used: tuple[str, ...] = ("seed", "models.clip", "train")
    if online:
        used += ("data.deep", "models.vision", "features.size", "features.compute")
    with agreement.hold(workdir / "checkpoints"):
        agreement.by_the_first(lambda: workfolder.claim(workdir, config, used, CHECKPOINTS))
        train(config, workdir)


if __name__ == "__main__":
    CONFIG, WORKDIR = program.define_config()
    HOSTS = program.define_hosts()
    program.run(main)
