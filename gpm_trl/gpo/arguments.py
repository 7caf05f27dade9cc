"""Arguments that a parent class is given other values of."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def temporarily(holder: Any, **values: Any) -> Iterator[None]:
    """Within, attributes of `holder`, such as training arguments, have other values; also where something raises."""
    before = {name: getattr(holder, name) for name in values}
    try:
        for name, value in values.items():
            setattr(holder, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(holder, name, value)
