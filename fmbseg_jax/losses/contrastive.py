"""The losses of section 3.3: TSupCon (equation 1), and its ablations of Table 2.

All take unit vectors: patches z_i with labels y_i, and one text feature t_k for each word. With
s_ij = z_i · z_j / τ and u_ik = z_i · t_k / τ (the printed equations have τ = 1),

    ℓ_t(t_k)  = 1/N_k Σ_{i: y_i = k} ( -u_ik + log( Σ_k' exp u_ik' + Σ_{j≠i} exp s_ij ) )    (2, 3)
    ℓ_im(z_i) = 1/N_{y_i} Σ_{l: y_l = y_i} ( -s_il + log Σ_{j≠i} exp s_ij )                   (4)
    TSupCon   = 1/(M + K) ( w Σ_k ℓ_t(t_k) + Σ_i ℓ_im(z_i) ),  w = 1 as printed               (1)

M is the number of labelled patches: those labelled IGNORE take no part at all, neither as anchors
nor among the others. l = i is among the positives, as printed. A word without a patch has ℓ_t = 0.

No M × M matrix is held. The positives are class sums: Σ_l s_il = z_i · Σ_{l: y_l = y_i} z_l / τ.
What is left of the pairs is one log-sum-exp for each patch: `pairs.logsumexp`.

With `axis_name` a loss runs under `jax.shard_map`, on each device's share of the batch, and is the
loss of the whole batch on all of them: class sums go by `psum`, pairs round a ring.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fmbseg_jax.losses import logsumexp
from fmbseg_jax.nn.similarity import product
from fmbseg_jax.parallel.ring import total
from fmbseg_jax.vocabulary import IGNORE


def tsupcon(
    patches: Float[Array, "M D"],
    labels: Int[Array, " M"],
    text: Float[Array, "K D"],
    *,
    temperature: float,
    text_weight: float | Array = 1.0,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """TSupCon, equation 1.

    Args:
      patches: z, unit vectors.
      labels: y, word index in [0, K) or IGNORE.
      text: t, unit vectors.
      temperature: τ.
      text_weight: w.
      block_size: rows of the pair matrix computed at once; None chooses. Not a result.
      axis_name: of the mesh over which `patches` and `labels` are split, under `jax.shard_map`;
        any number on each device. `text` is the same on all.

    Returns:
      The loss; 0 where no patch is labelled.
    """
    valid = labels != IGNORE
    others = logsumexp.logsumexp(patches, valid, temperature, block_size, axis_name)
    text_terms = _prototype_terms(patches, labels, text, others, temperature, axis_name)
    ones = jnp.ones_like(others)
    image_terms = _image_terms(patches, labels, text.shape[0], others, ones, temperature, axis_name)
    count = total(jnp.sum(valid), axis_name) + text.shape[0]
    return (text_weight * jnp.sum(text_terms) + image_terms) / count


def prototype(
    patches: Float[Array, "M D"],
    labels: Int[Array, " M"],
    text: Float[Array, "K D"],
    *,
    temperature: float,
    text_weight: float | Array = 1.0,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """The text terms alone: w/K Σ_k ℓ_t(t_k) of equation 2. Arguments as for `tsupcon`."""
    others = logsumexp.logsumexp(patches, labels != IGNORE, temperature, block_size, axis_name)
    terms = _prototype_terms(patches, labels, text, others, temperature, axis_name)
    return text_weight * jnp.sum(terms) / text.shape[0]


def supcon(
    patches: Float[Array, "M D"],
    labels: Int[Array, " M"],
    text: Float[Array, "K D"],
    *,
    temperature: float,
    text_weight: float | Array = 1.0,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """SupCon with the text features as K more examples of their words (section 4.4.1).

    Equation 4 over the M + K vectors; the terms of the K text anchors are weighted by w. Arguments
    as for `tsupcon`.
    """
    num_words = text.shape[0]
    count = total(jnp.sum(labels != IGNORE), axis_name)
    # The words are examples once: on the first device, and where there is a patch to compare with.
    first = True if axis_name is None else jax.lax.axis_index(axis_name) == 0
    here = (count > 0) & first
    words = jnp.where(here, jnp.arange(num_words), IGNORE).astype(labels.dtype)
    examples, classes = jnp.concatenate([patches, text]), jnp.concatenate([labels, words])
    others = logsumexp.logsumexp(examples, classes != IGNORE, temperature, block_size, axis_name)
    weights = jnp.where(jnp.arange(len(others)) < len(labels), 1.0, text_weight).astype(
        others.dtype
    )
    terms = _image_terms(examples, classes, num_words, others, weights, temperature, axis_name)
    return terms / (count + num_words)


LOSSES = {"tsupcon": tsupcon, "prototype": prototype, "supcon": supcon}


def _prototype_terms(
    patches: Float[Array, "M D"],
    labels: Int[Array, " M"],
    text: Float[Array, "K D"],
    others: Float[Array, " M"],
    temperature: float,
    axis_name: str | None,
) -> Float[Array, " K"]:
    """ℓ_t(t_k) of equations 2 and 3 over all devices; 0 for a word without a patch."""
    member = jax.nn.one_hot(
        labels, text.shape[0], dtype=jnp.float32
    )  # IGNORE is out of range: a row of zeros
    similarity = product(patches, text.T) / temperature
    everything = jnp.logaddexp(jax.nn.logsumexp(similarity, axis=1), others)
    terms = jnp.sum(member * (everything[:, None] - similarity), axis=0)
    count = jnp.sum(member, axis=0)
    return total(terms, axis_name) / jnp.maximum(total(count, axis_name), 1)


def _image_terms(
    patches: Float[Array, "M D"],
    labels: Int[Array, " M"],
    num_words: int,
    others: Float[Array, " M"],
    weights: Float[Array, " M"],
    temperature: float,
    axis_name: str | None,
) -> Float[Array, ""]:
    """Σ_i w_i ℓ_im(z_i) of equation 4, over all devices.

    ℓ_im is 0 for a patch labelled IGNORE, or alone in the batch.
    """
    member = jax.nn.one_hot(labels, num_words, dtype=jnp.float32)
    count = jnp.maximum(total(jnp.sum(member, axis=0), axis_name), 1)
    means = total(product(member.T, patches), axis_name) / count[:, None]
    weights = jnp.where(jnp.any(member > 0, axis=1) & jnp.isfinite(others), weights, 0)
    # Σ_i w_i z_i · mean_{y_i}, word by word: no vector for each patch.
    sums = product((member * weights[:, None]).T, patches)
    # The `where` keeps an empty log-sum-exp, -inf, out of the gradient.
    everything = jnp.sum(weights * jnp.where(weights > 0, others, 0))
    return total(everything - jnp.sum(sums * means) / temperature, axis_name)
