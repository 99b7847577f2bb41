"""Windows of many images in batches of one size: nothing lost, nothing twice, in order."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fmbseg_jax.segmentation import batching


@settings(deadline=None)  # the first compiles
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 8))
def test_every_window_once_and_in_order(counts, size):
    ends = np.cumsum(counts)
    numbers = [
        np.arange(end - count, end, dtype=np.float32)[:, None]
        for count, end in zip(counts, ends, strict=True)
    ]
    given_to = []

    def run(number, batch):
        assert number == len(given_to)
        given_to.append(batch)
        return jnp.asarray(batch) + 0.5

    seen = 0
    for i, found in enumerate(batching.encode(enumerate(numbers), size, run)):
        assert found.key == i
        features = np.concatenate(found.batches)[found.index]
        np.testing.assert_array_equal(features, numbers[i] + 0.5)
        seen += 1
    assert seen == len(counts)
    total = sum(counts)
    assert len(given_to) == -(-total // size)
    assert all(len(batch) == size for batch in given_to)


def test_an_image_comes_as_soon_as_its_windows_are_encoded():
    taken = []

    def images():
        for i in range(10):
            taken.append(i)
            yield i, np.zeros((2, 1), np.float32)

    first = next(iter(batching.encode(images(), 4, lambda _, batch: jnp.asarray(batch))))
    assert first.key == 0
    assert taken == [0, 1]
