"""Training the aligner: its state, the step, the schedule."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from fmbseg_jax import losses
from fmbseg_jax.config import Train
from fmbseg_jax.patches import encode
from fmbseg_jax.similarity import similarities
from fmbseg_jax.vocabulary import IGNORE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes, and a checkpoint holds."""

    step: Array
    params: Any
    opt_state: Any


class Objective(NamedTuple):
    """What a step minimises, and how; hashable, so that jit compiles it in."""

    aligner: nn.Module
    encoder: nn.Module | None
    """The frozen encoder, where batches hold pixels."""
    optimizer: optax.GradientTransformation
    loss: str
    temperature: float
    text_weight: float
    balanced: bool
    mesh: Mesh | None = None
    """Where the batch is split over several devices."""


def schedule(train: Train, steps: int) -> optax.Schedule:
    """Linear warm-up to `peak_lr`, then a cosine to 0 at the last step."""
    warmup = min(max(1, round(train.warmup * steps)), max(1, steps - 1))
    return optax.warmup_cosine_decay_schedule(0.0, train.peak_lr, warmup, max(steps, warmup + 1))


def optimizer(train: Train, steps: int) -> optax.GradientTransformation:
    """SGD with momentum (the paper's) or AdamW; decay of matrices only, gradients clipped."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    rate = schedule(train, steps)
    if train.optimizer == "adamw":
        update = optax.adamw(rate, weight_decay=train.weight_decay, mask=matrices)
    else:
        update = optax.chain(
            optax.add_decayed_weights(train.weight_decay, mask=matrices),
            optax.sgd(rate, momentum=train.momentum),
        )
    if train.clip_norm:
        return optax.chain(optax.clip_by_global_norm(train.clip_norm), update)
    return update


def create_state(objective: Objective, seed: int, width: int) -> TrainState:
    """A fresh aligner for patches of `width` channels."""
    params = objective.aligner.init(jax.random.key(seed), jnp.zeros((1, 4, width)))["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, objective.optimizer.init(params))


@functools.partial(jax.jit, static_argnames="objective", donate_argnames="state")
def train_step(
    state: TrainState, batch: dict[str, Array], text: Array, frozen: Any, *, objective: Objective
) -> tuple[TrainState, dict[str, Array]]:
    """One step of gradient descent on the loss over the global batch.

    Args:
      batch: labels int32 [b, n], and patches [b, n, d] or pixels uint8 [b, H, W, 3], split over the
        devices.
      text: unit features [K, D].
      frozen: params of the encoder; {} where there is none.

    Returns:
      The next state, and scalars: loss, accuracy over labelled patches, gradient norm.
    """
    labels = batch["labels"].reshape(-1)
    if objective.encoder is None:
        patches = batch["patches"].astype(jnp.float32)
    else:
        patches = encode(objective.encoder, frozen, batch["pixels"])

    def loss_of(params: Any) -> tuple[Array, Array]:
        aligned = objective.aligner.apply({"params": params}, patches)
        aligned = aligned.reshape(-1, aligned.shape[-1])
        weight = jnp.asarray(_text_weight(objective, labels, text.shape[0]))
        return _loss(objective)(aligned, labels, text, weight), aligned

    (loss, aligned), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = objective.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    right = jnp.argmax(similarities(aligned, text), axis=-1) == labels
    accuracy = jnp.sum(right) / jnp.maximum(jnp.sum(labels != IGNORE), 1)
    metrics = {"loss": loss, "accuracy": accuracy, "gradient_norm": optax.global_norm(gradient)}
    return TrainState(state.step + 1, params, opt_state), metrics


def _loss(objective: Objective) -> Callable[[Array, Array, Array, Array], Array]:
    """(patches, labels, text, text weight) → the loss of the global batch."""
    mesh = objective.mesh

    def loss(patches: Array, labels: Array, text: Array, weight: Array) -> Array:
        return losses.LOSSES[objective.loss](
            patches, labels, text,
            temperature=objective.temperature, text_weight=weight,
            axis_name=mesh.axis_names[0] if mesh else None,
        )  # fmt: skip

    if mesh is None:
        return loss
    split, same = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
    return jax.shard_map(loss, mesh=mesh, in_specs=(split, split, same, same), out_specs=same)


def _text_weight(objective: Objective, labels: Array, num_words: int) -> float | Array:
    """w of equation 1; balanced, times (labelled patches) / (words that have one)."""
    if not objective.balanced or objective.loss != "tsupcon":
        return objective.text_weight
    counts = jnp.sum(jax.nn.one_hot(labels, num_words), axis=0)
    return objective.text_weight * jnp.sum(counts) / jnp.maximum(jnp.sum(counts > 0), 1)
