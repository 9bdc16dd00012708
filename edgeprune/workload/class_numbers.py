"""What labels must be: one class number a sample. Labels of another task are named for what they look like. No torch here.

Notation: ``N`` samples.
"""

from __future__ import annotations

import numpy as np

from edgeprune.errors import ModelError

ONLY = "edgeprune prunes classifiers, which give every sample one class"


def check_class_numbers(y: np.ndarray, where: str) -> None:
    """Raise unless labels are ``[N]`` whole numbers.

    Args:
        y: as it was given.
        where: what errors call it.

    Raises:
        ModelError: they are of another shape or type; the hint says which task has such labels, or how to make class numbers of them.
    """
    if y.ndim != 1:
        raise ModelError(
            f"y must be [N] class numbers, but {where} has {list(y.shape)}", hint=_shape_hint(y)
        )
    if not np.issubdtype(y.dtype, np.integer):
        raise ModelError(
            f"y must be whole class numbers, but {where} is {y.dtype}", hint=_type_hint(y)
        )


def far_outside(top: int, outputs: int) -> str:
    """The hint for a label ``top`` that a model with so many outputs has no output for."""
    if top < 2 * outputs:
        return "count classes from 0"
    return f"numbers that large may be measured values or identities, not classes; {ONLY}"


def _shape_hint(y: np.ndarray) -> str:
    if y.ndim != 2:
        return f"a label for each position is no class of the sample; {ONLY}"
    if y.shape[1] == 1:
        return "use y[:, 0]" if _is_whole(y) else _measured()
    if _is_number(y) and np.isin(y, (0, 1)).all():
        if (y.sum(axis=1) == 1).all():
            return "use y.argmax(axis=1) for one-hot rows"
        return f"rows of 0 and 1 with other than one 1 are several labels a sample; {ONLY}"
    if _is_number(y) and (y >= 0).all() and np.allclose(y.sum(axis=1), 1, atol=1e-3):
        return "use y.argmax(axis=1) for rows of probabilities"
    return _measured()


def _type_hint(y: np.ndarray) -> str:
    if _is_whole(y):
        return "use y.astype('int64') if these are class numbers"
    return (
        _measured() if _is_number(y) else "number the classes from 0, in the order of the outputs"
    )


def _is_number(y: np.ndarray) -> bool:
    return bool(np.issubdtype(y.dtype, np.number) or y.dtype == np.bool_)


def _is_whole(y: np.ndarray) -> bool:
    return _is_number(y) and bool(np.isfinite(y).all()) and bool((y == np.floor(y)).all())


def _measured() -> str:
    return f"measured values are for regression; {ONLY}"
