"""An unpickler that changes nothing outside of what it builds."""

from __future__ import annotations

import pickle
from typing import Any, ClassVar


class ListedUnpickler(pickle._Unpickler):
    """Base of unpicklers with an allow-list, which their `find_class` is.

    A pickle may not only make objects of the classes on a list. The opcode BUILD sets attributes of
    whatever it is given, a class, a function or a member of an enum as well, and for the whole
    process. So it is for instances of `builds` alone. (Python's own unpickler, not C's: that one
    cannot be asked.)
    """

    builds: tuple[type, ...] = ()
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not on the list")

    def load_build(self) -> None:
        target = self.stack[-2]
        if type(target) not in self.builds:
            raise pickle.UnpicklingError(f"it sets attributes of a {type(target).__name__}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build
