"""Registry of adapters: the entry-point group ``hetkd.adapters``, and `register_adapter`."""

import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from torch import nn

from hetkd.features.adapter import Adapter
from hetkd.utils.checks import Registry

ENTRY_POINT_GROUP = "hetkd.adapters"

adapters: Registry[type[Adapter]] = Registry("adapter")

_loaded: set[str] = set()

AdapterClass = TypeVar("AdapterClass", bound=type[Adapter])


def register_adapter(name: str) -> Callable[[AdapterClass], AdapterClass]:
    """Return a class decorator that registers an `Adapter` under ``name``.

    Packages do the same without an import, by an entry point in the group ``hetkd.adapters``.

    Raises:
        ValueError: If the name is malformed or taken.
        TypeError: If what is decorated is not a subclass of `Adapter`.

    Example:
        >>> from hetkd import HookAdapter
        >>> @register_adapter("stripe-example")
        ... class StripeAdapter(HookAdapter):
        ...     family = "stripe"
        ...     def accepts(self, model): return type(model).__name__ == "Stripe"
        ...     def stage_names(self, model, images): return ["blocks.0", "blocks.1"]
        >>> "stripe-example" in list_adapters()
        True
    """
    _load_entry_points()
    add = adapters.register(name)

    def decorate(adapter: AdapterClass) -> AdapterClass:
        add(_checked(name, adapter))
        return adapter

    return decorate


def _checked(name: str, adapter: Any) -> Any:
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise TypeError(f"adapter {name!r} must be a subclass of hetkd.Adapter, got {adapter!r}.")
    return adapter


def list_adapters() -> list[str]:
    """Return the names of all adapters, those of installed plug-ins included.

    Example:
        >>> list_adapters()[:2]
        ['cnn', 'generic']
    """
    _load_entry_points()
    return adapters.names()


def find_adapter(model: nn.Module) -> Adapter:
    """Return the adapter that taps ``model``: of those that accept it, the one of highest priority.

    Raises:
        TypeError: If no adapter accepts the model.
    """
    _load_entry_points()
    ranked = sorted(adapters.names(), key=lambda name: -adapters[name].priority)
    for name in ranked:
        adapter = adapters[name]()
        try:
            accepted = adapter.accepts(model)
        except Exception as error:  # whatever a plug-in does wrong, the others go on working
            message = f"hetkd adapter {name!r} fails to say whether it accepts {type(model).__name__} ({error!r})."
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            continue
        if accepted:
            return adapter
    raise TypeError(
        f"no adapter accepts {type(model).__name__}; write one (docs/guides/own-adapter.md). Asked: {ranked}."
    )


def _load_entry_points() -> None:
    if _loaded:
        return
    _loaded.add(ENTRY_POINT_GROUP)  # first, for a plug-in that registers by the decorator comes back here
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            adapter = _checked(entry_point.name, entry_point.load())
            if entry_point.name not in adapters or adapters[entry_point.name] is not adapter:
                adapters.register(entry_point.name)(adapter)
        except Exception as error:  # a plug-in may fail in any way; the others must go on working
            origin = entry_point.dist.name if entry_point.dist else "an unknown package"
            message = f"hetkd adapter {entry_point.name!r} of {origin} does not load ({error!r}) and is left out."
            warnings.warn(message, RuntimeWarning, stacklevel=2)
