"""State dicts with a library's own keys, of a backbone that has the library's network inside."""

from typing import Any

from torch import nn

_CHILD = "network."


def as_of_network(backbone: nn.Module) -> None:
    """From now on state_dict() of `backbone` has no prefix "network.", and loading takes none.

    Args:
        backbone: all of whose weights lie in its child `network`.
    """
    backbone.register_state_dict_post_hook(_without_prefix)
    backbone.register_load_state_dict_pre_hook(_with_prefix)


# Functions of a module, not of a call: a backbone can be copied and pickled.


def _without_prefix(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    for key in [key for key in state if key.startswith(prefix + _CHILD)]:
        state[prefix + key.removeprefix(prefix + _CHILD)] = state.pop(key)


def _with_prefix(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + _CHILD + key.removeprefix(prefix)] = state.pop(key)
