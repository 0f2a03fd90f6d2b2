"""Fields of state tuples: a checkpoint restored without its type must not be permuted."""

import importlib
import pkgutil

import optax_dcasgd


def state_tuples():
    """All NamedTuples of the package whose name ends in State."""
    for module in pkgutil.walk_packages(optax_dcasgd.__path__, "optax_dcasgd."):
        if ".parameter_server" in module.name or "mosaic" in module.name:  # keep no such state
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("State") and isinstance(value, type) and issubclass(value, tuple):
                yield value


def test_fields_of_every_state_are_in_alphabetical_order():
    """Orbax restores a NamedTuple as a dict where it is not told the type; a dict is sorted."""
    found = {state.__name__: list(state._fields) for state in state_tuples()}
    assert found.keys() >= {
        "DCASGDState",
        "DelayGradientsState",
        "MasterWeightsState",
        "OverlapReductionState",
        "RememberParamsState",
        "RuleState",
        "ScaleByGapState",
        "ScaleByStalenessState",
        "TrackVelocityState",
    }
    assert {name: sorted(fields) for name, fields in found.items()} == found
