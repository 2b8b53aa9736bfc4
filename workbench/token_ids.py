"""Token ids from outside: checked, widened to int64 and freed of padding."""

from typing import Any

from workbench.errors import DataError

_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32")


def as_ids(values: Any, where: str) -> Any:
    """Return one prompt's ids as an int64 numpy array ``[pos]``; refuse anything else."""
    import numpy as np  # slow to import, and texts need none

    if not hasattr(values, "dtype"):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise DataError(f"token ids must be whole numbers; {where} has {value!r}")
    array = as_array(values) if len(values) else np.zeros(0, dtype=np.int64)
    if array.ndim != 1:
        raise DataError(f"a prompt must be one list of ids; {where} has {array.ndim} axes")
    if not len(array):
        raise DataError(f"a prompt must not be empty; {where} has no ids; remove it")
    return array


def as_array(values: Any) -> Any:
    """Return integers as int64 numpy; refuse floats, which would be rounded silently."""
    import numpy as np

    if not hasattr(values, "dtype"):
        try:
            values = np.asarray(values)
        except ValueError as error:
            raise DataError("tokens must be rectangular [batch pos]; the rows differ") from error
    dtype = str(values.dtype).removeprefix("torch.")
    if dtype not in _INTEGERS:
        raise DataError(f"tokens must be integers (int64); got {dtype}; give token ids")
    values = values.detach().cpu() if hasattr(values, "detach") else values
    return np.asarray(values).astype(np.int64)


def split_batch(tokens: Any, mask: Any, where: str) -> tuple[Any, ...]:
    """Cut tokens ``[batch pos]`` into prompts, without their padding on either side.

    Args:
        tokens: Integers, torch or numpy.
        mask: Same shape, 1 where a token is; None when nothing is padded.
        where: Whose tokens they are, for messages.

    Raises:
        DataError: Wrong dtype or shape, an empty prompt, or a mask with holes.
    """
    array = as_array(tokens)
    if array.ndim != 2:
        shape = list(array.shape)
        hint = "; add the batch axis: tokens[None]" if array.ndim == 1 else ""
        raise DataError(f"{where} must have shape [batch pos]; got {shape}{hint}")
    if not array.size:
        raise DataError(f"{where} must hold at least one token; got shape {list(array.shape)}")
    if mask is None:
        return tuple(array)
    return tuple(array[i, span] for i, span in enumerate(_spans(mask, array.shape, where)))


def _spans(mask: Any, shape: tuple[int, ...], where: str) -> list[slice]:
    """Where each prompt's tokens are."""
    import numpy as np

    kept = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask)
    if kept.shape != shape:
        found = f"{list(kept.shape)} for tokens {list(shape)}"
        raise DataError(f"attention_mask of {where} must have the tokens' shape; got {found}")
    if not np.isin(kept, (0, 1)).all():
        raise DataError(f"attention_mask of {where} must be 0 or 1 everywhere; got other values")
    spans = []
    for index, row in enumerate(kept):
        places = np.flatnonzero(row)
        if not len(places):
            raise DataError(f"a prompt must not be empty; the mask of prompt {index} is all 0")
        if places[-1] - places[0] + 1 != len(places):
            hole = places[0] + int(np.argmin(row[places[0] :]))
            raise DataError(
                f"attention_mask may be 0 only before or after a prompt; prompt {index} has a "
                f"hole at position {hole}; take the padding out of the middle"
            )
        spans.append(slice(int(places[0]), int(places[-1]) + 1))
    return spans
