"""The losses of section 3.3: TSupCon (equation 1), and its ablations of Table 2.

All take unit vectors: patches z_i with labels y_i, and one text feature t_k for each word. With
s_ij = z_i · z_j / τ and u_ik = z_i · t_k / τ (the printed equations have τ = 1),

    ℓ_t(t_k)  = 1/N_k Σ_{i: y_i = k} ( -u_ik + log( Σ_k' exp u_ik' + Σ_{j≠i} exp s_ij ) )    (2, 3)
    ℓ_im(z_i) = 1/N_{y_i} Σ_{l: y_l = y_i} ( -s_il + log Σ_{j≠i} exp s_ij )                   (4)
    TSupCon   = 1/(M + K) ( w Σ_k ℓ_t(t_k) + Σ_i ℓ_im(z_i) ),  w = 1 as printed               (1)

M is the number of labelled patches: those labelled IGNORE take no part at all, neither as anchors
nor among the others. l = i is among the positives, as printed. A word without a patch has ℓ_t = 0.

No M × M matrix is held. The positives are class sums: Σ_l s_il = z_i · Σ_{l: y_l = y_i} z_l / τ.
What is left of the pairs is one log-sum-exp for each patch, which `pair_logsumexp` computes in
blocks of rows, and again in the backward pass.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmbseg_jax.vocabulary import IGNORE

_BLOCK = 512  # rows; 512 × 5,120 float32 are 10 MB: they stay in a CPU's cache


def tsupcon(
    patches: Float[Array, "M D"],
    labels: Int[Array, " M"],
    text: Float[Array, "K D"],
    *,
    temperature: float,
    text_weight: float | Array = 1.0,
    block_size: int | None = None,
) -> Float[Array, ""]:
    """TSupCon, equation 1.

    Args:
      patches: z, unit vectors.
      labels: y, word index in [0, K) or IGNORE.
      text: t, unit vectors.
      temperature: τ.
      text_weight: w.
      block_size: rows of the pair matrix computed at once; None chooses. Not a result.

    Returns:
      The loss; 0 where no patch is labelled.
    """
    valid = labels != IGNORE
    pairs = pair_logsumexp(patches, valid, temperature, block_size or _BLOCK)
    prototype_terms = _prototype_terms(patches, labels, text, pairs, temperature)
    image_terms = _image_terms(patches, labels, text.shape[0], pairs, temperature)
    count = jnp.sum(valid) + text.shape[0]
    return (text_weight * jnp.sum(prototype_terms) + jnp.sum(image_terms)) / count


def prototype(
    patches: Float[Array, "M D"],
    labels: Int[Array, " M"],
    text: Float[Array, "K D"],
    *,
    temperature: float,
    text_weight: float | Array = 1.0,
    block_size: int | None = None,
) -> Float[Array, ""]:
    """The text terms alone: w/K Σ_k ℓ_t(t_k) of equation 2. Arguments as for `tsupcon`."""
    pairs = pair_logsumexp(patches, labels != IGNORE, temperature, block_size or _BLOCK)
    terms = _prototype_terms(patches, labels, text, pairs, temperature)
    return text_weight * jnp.sum(terms) / text.shape[0]


def supcon(
    patches: Float[Array, "M D"],
    labels: Int[Array, " M"],
    text: Float[Array, "K D"],
    *,
    temperature: float,
    text_weight: float | Array = 1.0,
    block_size: int | None = None,
) -> Float[Array, ""]:
    """SupCon with the text features as K more examples of their words (section 4.4.1).

    Equation 4 over the M + K vectors; the terms of the K text anchors are weighted by w. Arguments
    as for `tsupcon`.
    """
    num_words = text.shape[0]
    labelled = jnp.any(labels != IGNORE)
    words = jnp.where(labelled, jnp.arange(num_words), IGNORE).astype(labels.dtype)
    examples = jnp.concatenate([patches, text])
    classes = jnp.concatenate([labels, words])
    pairs = pair_logsumexp(examples, classes != IGNORE, temperature, block_size or _BLOCK)
    terms = _image_terms(examples, classes, num_words, pairs, temperature)
    patch_terms, text_terms = terms[:-num_words], terms[-num_words:]
    count = jnp.sum(labels != IGNORE) + num_words
    return (jnp.sum(patch_terms) + text_weight * jnp.sum(text_terms)) / count


LOSSES = {"tsupcon": tsupcon, "prototype": prototype, "supcon": supcon}


def _prototype_terms(
    patches: Float[Array, "M D"],
    labels: Int[Array, " M"],
    text: Float[Array, "K D"],
    pairs: Float[Array, " M"],
    temperature: float,
) -> Float[Array, " K"]:
    """ℓ_t(t_k) of equations 2 and 3; 0 for a word without a patch."""
    member = jax.nn.one_hot(labels, text.shape[0])  # IGNORE is out of range: a row of zeros
    similarity = patches @ text.T / temperature
    everything = jnp.logaddexp(jax.nn.logsumexp(similarity, axis=1), pairs)
    total = jnp.sum(member * (everything[:, None] - similarity), axis=0)
    return total / jnp.maximum(jnp.sum(member, axis=0), 1)


def _image_terms(
    patches: Float[Array, "M D"],
    labels: Int[Array, " M"],
    num_words: int,
    pairs: Float[Array, " M"],
    temperature: float,
) -> Float[Array, " M"]:
    """ℓ_im(z_i) of equation 4; 0 for a patch labelled IGNORE, or alone in the batch."""
    member = jax.nn.one_hot(labels, num_words)
    count = jnp.maximum(jnp.sum(member, axis=0), 1)
    means = (member.T @ patches) / count[:, None]
    own_mean = member @ means
    counts = jnp.any(member > 0, axis=1) & jnp.isfinite(pairs)
    # The inner `where` keeps an empty log-sum-exp, -inf, out of the gradient of the outer one.
    finite = jnp.where(counts, pairs, 0)
    return jnp.where(counts, finite - jnp.sum(patches * own_mean, axis=1) / temperature, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def pair_logsumexp(
    patches: Float[Array, "M D"], valid: Array, temperature: float, block_size: int
) -> Float[Array, " M"]:
    """log Σ_{j≠i, valid j} exp(z_i · z_j / τ) for each patch i; -inf where there is no other.

    Args:
      patches: z.
      valid: bool [M].
      temperature: τ.
      block_size: rows computed at once.
    """

    def rows(_, block):  # type: ignore[no-untyped-def]
        index, anchors = block
        similarity = _masked_similarity(index, anchors, patches, valid, temperature)
        return None, jax.nn.logsumexp(similarity, axis=1)

    _, sums = jax.lax.scan(rows, None, _blocks(patches, block_size))
    return sums.reshape(-1)[: patches.shape[0]]


def _forward(patches, valid, temperature, block_size):  # type: ignore[no-untyped-def]
    sums = pair_logsumexp(patches, valid, temperature, block_size)
    return sums, (patches, valid, sums)


def _backward(temperature, block_size, residuals, gradient):  # type: ignore[no-untyped-def]
    """s is symmetric: ∂/∂Z = W Z / τ with W_ij = exp(s_ij) (g_i exp(-lse_i) + g_j exp(-lse_j))."""
    patches, valid, sums = residuals
    # A patch without others has lse = -inf and takes part in no pair: its exponent is never used.
    sums = jnp.where(jnp.isfinite(sums), sums, 0)
    (index, anchors), size = _blocks(patches, block_size), patches.shape[0]
    padding = (0, index.size - size)
    row_sums = jnp.pad(sums, padding).reshape(index.shape)
    row_gradient = jnp.pad(gradient, padding).reshape(index.shape)

    def rows(_, block):  # type: ignore[no-untyped-def]
        index, anchors, own_sums, own_gradient = block
        similarity = _masked_similarity(index, anchors, patches, valid, temperature)
        weights = jnp.exp(similarity - own_sums[:, None]) * own_gradient[:, None]
        # Rows of IGNORE have gradient 0 and a sum over others; as columns they are masked. A row's
        # own mask must hold for the second term too, where it stands among the others of j.
        others = jnp.exp(similarity - sums) * gradient
        row_valid = valid[jnp.minimum(index, size - 1)] & (index < size)
        weights = weights + jnp.where(row_valid[:, None], others, 0)
        return None, weights @ patches / temperature

    _, result = jax.lax.scan(rows, None, (index, anchors, row_sums, row_gradient))
    return result.reshape(-1, patches.shape[1])[:size], np.zeros(valid.shape, jax.dtypes.float0)


pair_logsumexp.defvjp(_forward, _backward)


def _blocks(patches: Float[Array, "M D"], block_size: int) -> tuple[Array, Array]:
    """Row numbers [blocks, rows] and rows [blocks, rows, D], padded with zeros."""
    size, width = patches.shape
    block_size = min(block_size, size)
    count = -(-size // block_size)
    padded = jnp.pad(patches, ((0, count * block_size - size), (0, 0)))
    index = jnp.arange(count * block_size).reshape(count, block_size)
    return index, padded.reshape(count, block_size, width)


def _masked_similarity(
    index: Array, anchors: Array, patches: Array, valid: Array, temperature: float
) -> Array:
    """s_ij of a block of rows [rows, M]; -inf where j is i, or takes no part."""
    similarity = anchors @ patches.T / temperature
    other = index[:, None] != jnp.arange(patches.shape[0])
    return jnp.where(other & valid, similarity, -jnp.inf)
