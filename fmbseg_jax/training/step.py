"""Training the aligner: its state, the step, the schedule."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from fmbseg_jax import losses
from fmbseg_jax.config import Train
from fmbseg_jax.encoders.patches import encode
from fmbseg_jax.nn import aligner as aligners
from fmbseg_jax.nn.similarity import similarities
from fmbseg_jax.parallel.ring import total
from fmbseg_jax.vocabulary import IGNORE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes, and a checkpoint holds."""

    step: Array
    params: Any
    opt_state: Any
    key: Array
    """Of the random numbers: step i draws from it folded with i. uint32 [2]."""


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
    dtype: str = "float32"
    """What the aligner and the loss multiply in; parameters and sums are float32."""
    patches_per_image: int = 0
    """Patches drawn from each image for the loss; 0 takes all."""
    images_per_pass: int = 0
    """Images that a device puts through the aligner at once; 0 takes all."""
    mesh: Mesh | None = None
    """Where the batch is split over several devices."""


def objective(
    train: Train,
    aligner: dict[str, Any],
    steps: int,
    *,
    encoder: nn.Module | None = None,
    mesh: Mesh | None = None,
) -> Objective:
    """What the config says.

    Args:
      aligner: arguments of `models.aligner.create`, but for its dtype.
      steps: of the whole training.
      encoder: where batches hold pixels.
      mesh: where there are several devices.
    """
    return Objective(
        aligner=aligners.create(**aligner, dtype=train.compute),
        encoder=encoder,
        optimizer=optimizer(train, steps),
        loss=train.loss,
        temperature=train.temperature,
        text_weight=train.text_weight,
        balanced=train.balanced,
        dtype=train.compute,
        patches_per_image=train.patches_per_image,
        images_per_pass=train.images_per_pass,
        mesh=mesh if mesh and mesh.size > 1 else None,
    )


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
    key = jax.random.PRNGKey(seed)
    params = jax.jit(objective.aligner.init)(key, jnp.zeros((1, 4, width), jnp.float32))["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, objective.optimizer.init(params), key)


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
      The next state, and scalars: loss, accuracy over the labelled patches of the loss, gradient
      norm, whether loss, gradient and new parameters are finite, and whether the patches were.
    """
    loss_of = functools.partial(_loss, objective)
    if objective.mesh:
        split, same = PartitionSpec(objective.mesh.axis_names[0]), PartitionSpec()
        loss_of = jax.shard_map(
            loss_of,
            mesh=objective.mesh,
            in_specs=(same, split, same, same, same),
            out_specs=(same, same),
        )
    key = jax.random.fold_in(state.key, state.step)
    (loss, (accuracy, patches_finite)), gradient = jax.value_and_grad(loss_of, has_aux=True)(
        state.params, batch, text, frozen, key
    )
    updates, opt_state = objective.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = [jnp.all(jnp.isfinite(x)) for x in (loss, *jax.tree.leaves((gradient, params)))]
    metrics = {
        "loss": loss,
        "accuracy": accuracy,
        "gradient_norm": optax.global_norm(gradient),
        "finite": jnp.all(jnp.stack(finite)),
        "patches_finite": patches_finite,
    }
    return TrainState(state.step + 1, params, opt_state, state.key), metrics


def _loss(
    objective: Objective, params: Any, batch: dict[str, Array], text: Array, frozen: Any, key: Array
) -> tuple[Array, tuple[Array, Array]]:
    """Loss over the global batch, from this device's share of it.

    Returns:
      The loss; the accuracy, and whether no patch of the batch is NaN or infinite.
    """
    axis_name = objective.mesh.axis_names[0] if objective.mesh else None
    if objective.encoder is None:
        patches = batch["patches"].astype(jnp.float32)
    else:
        patches = encode(objective.encoder, frozen, batch["pixels"])
    aligned, labels = _aligned(objective, params, patches), batch["labels"]
    if 0 < objective.patches_per_image < labels.shape[1]:
        aligned, labels = _draw(aligned, labels, objective.patches_per_image, key, axis_name)
    aligned = aligned.reshape(-1, aligned.shape[-1]).astype(objective.dtype)
    labels, words = labels.reshape(-1), text.astype(objective.dtype)
    loss = losses.LOSSES[objective.loss](
        aligned, labels, words,
        temperature=objective.temperature,
        text_weight=_text_weight(objective, labels, text.shape[0], axis_name),
        axis_name=axis_name,
    )  # fmt: skip
    right = jnp.argmax(similarities(aligned, words), axis=-1) == labels
    unfit = jnp.sum(~jnp.isfinite(patches))
    counts = total(jnp.stack([jnp.sum(right), jnp.sum(labels != IGNORE), unfit]), axis_name)
    return loss, (counts[0] / jnp.maximum(counts[1], 1), counts[2] == 0)


def _aligned(objective: Objective, params: Any, patches: Array) -> Array:
    """Unit vectors float32 [b, n, D].

    In passes, each is computed again for the gradient, which is that of the whole batch. (Adding up
    the gradients of smaller batches would not be: their pairs of patches would be left out.)
    """

    def one(image: Array) -> Array:
        return objective.aligner.apply({"params": params}, image[None])[0]

    if not 0 < objective.images_per_pass < len(patches):
        return objective.aligner.apply({"params": params}, patches)
    return jax.lax.map(jax.checkpoint(one), patches, batch_size=objective.images_per_pass)


def _draw(
    aligned: Array, labels: Array, count: int, key: Array, axis_name: str | None
) -> tuple[Array, Array]:
    """`count` patches of each image, labelled ones first; the same on however many devices."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(labels)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
        first + jnp.arange(len(labels), dtype=jnp.int32)
    )
    lots = jax.vmap(lambda key: jax.random.uniform(key, labels.shape[1:], jnp.float32))(keys)
    chosen = jax.lax.top_k(jnp.where(labels == IGNORE, -1, lots), count)[1]
    return (
        jnp.take_along_axis(aligned, chosen[..., None], axis=1),
        jnp.take_along_axis(labels, chosen, axis=1),
    )


def _text_weight(
    objective: Objective, labels: Array, num_words: int, axis_name: str | None
) -> float | Array:
    """w of equation 1; balanced, times (labelled patches) / (words that have one)."""
    if not objective.balanced or objective.loss != "tsupcon":
        return objective.text_weight
    counts = total(jnp.sum(jax.nn.one_hot(labels, num_words, dtype=jnp.float32), axis=0), axis_name)
    return objective.text_weight * jnp.sum(counts) / jnp.maximum(jnp.sum(counts > 0), 1)
