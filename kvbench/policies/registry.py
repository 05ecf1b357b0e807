"""Find policies by name: every entry point of the group `kvbench.policies` is a method, ours or another package's."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from importlib.metadata import entry_points

from kvbench.errors import ConfigError
from kvbench.policies.base import Policy

ENTRY_POINT_GROUP = "kvbench.policies"
BACKEND_HAS_GONE = (
    " is no option of a method any more: kernels are the engine's choice, so leave it out and set engine.kernels "
    "(auto, torch or triton; engine=plain is torch everywhere)"
)

logger = logging.getLogger(__name__)


def load_policies() -> dict[str, type[Policy]]:
    """Load all installed policies.

    Returns:
        Class by method name, sorted by name.

    Raises:
        ConfigError: if an entry point cannot be imported, is no `Policy`, or two packages claim one name.
    """
    policies: dict[str, type[Policy]] = {}
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        origin = f"entry point {entry_point.name} = {entry_point.value}"
        try:
            policy = entry_point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{origin} cannot be loaded ({error}): mend or uninstall the package") from error
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise ConfigError(f"{origin} is not a subclass of kvbench.policies.base.Policy: correct the entry point")
        if policies.setdefault(entry_point.name, policy) is not policy:
            raise ConfigError(f"{origin} claims a name that another package has: uninstall one of them")
    return policies


def build_policy(name: str, options: Mapping[str, object] | None = None) -> Policy:
    """Build a policy from its method name and options.

    Args:
        name: method name, e.g. "kvmerger".
        options: field values, `budget` among them; fields left out keep their defaults.

    Raises:
        ConfigError: for an unknown method or option (the message lists the choices), or a value the method refuses.
    """
    policies = load_policies()
    if name not in policies:
        raise ConfigError(f"unknown method {name!r}: choose one of {', '.join(policies)}")
    policy = policies[name]
    given = dict(options or {})
    known = [field.name for field in dataclasses.fields(policy)]
    if "backend" in given and "backend" not in known:
        pass_over_backend(given.pop("backend"))
    unknown = [option for option in given if option not in known]
    if unknown:
        raise ConfigError(f"unknown option {', '.join(unknown)} for method {name}: choose among {', '.join(known)}")
    return policy(**given)  # type: ignore[arg-type]  # every policy validates its own fields


def pass_over_backend(value: object) -> None:
    """Say what has become of an option that three methods once had; "auto", its default, may still be given.

    Raises:
        ConfigError: for any other value, which nobody would obey.
    """
    if value != "auto":
        raise ConfigError(f"backend={value}{BACKEND_HAS_GONE}")
    logger.warning("backend=%s%s", value, BACKEND_HAS_GONE)
