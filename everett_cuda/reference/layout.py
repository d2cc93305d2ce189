"""Logical indices: which e each element of a tensor, or of a shard of one, has."""

import numpy as np


def row_major(shape):
    """Strides, in elements, of the logical (unsharded, row-major) shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def logical_indices(shape, offset=0, strides=None):
    """e of every element of a tensor of this shape: offset + i0*strides[0] + i1*strides[1] + ..., uint64.

    Without strides: those of the shape itself, so e counts 0, 1, 2, ... in row-major order whatever the memory layout.
    A shard passes where its first element lies in the whole tensor and the whole tensor's row-major strides.
    A stride of 0 repeats one decision along a dimension (as in Dropout2d).
    """
    strides = row_major(shape) if strides is None else strides
    e = np.full(shape, offset, np.uint64)
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        steps = np.arange(size, dtype=np.uint64) * np.uint64(stride % 2**64)
        e += steps.reshape([-1 if d == axis else 1 for d in range(len(shape))])
    return e


def shard_indices(whole_shape, starts, shape):
    """e of the block of this shape that begins at `starts` in a tensor of `whole_shape`."""
    strides = row_major(whole_shape)
    return logical_indices(shape, sum(a * b for a, b in zip(starts, strides, strict=True)), strides)


def row_indices(rows, columns):
    """e = row*N32 + column of row operations (norms, embedding), N32 = row length rounded up to a multiple of 32."""
    return logical_indices((rows, columns), 0, (-(-columns // 32) * 32, 1))
