"""Which kind of task a stream is: a property of its images, never of a method."""

from __future__ import annotations

from typing import Any

from lamina.data.stream import Stream
from lamina.errors import ConfigError
from lamina.registry import method_class
from lamina.training.kind import Kind

#: settings of methods that say what a classifier is
_OF_HEADS = {"head", "head_start"}


def kind_of(stream: Stream, run: Any) -> Kind:
    """Return what a run asks of the images of a stream.

    Args:
        run: its `lamina.runs.RunSettings`.

    Raises:
        ConfigError: when the run asks for what this kind does not have.
    """
    if not stream.dense:
        if run.dense is not None:
            name, value = next(iter(run.dense.changed().items()), ("channels", None))
            raise ConfigError(
                f"dense.{name} is for streams whose images have label maps, and {stream.name} is none; got {value}: "
                "leave it out"
            )
        return Kind()
    for name in ("measure_drift", "measure_novelty"):
        if getattr(run, name):
            raise ConfigError(f"{name} compares tasks, and a stream of label maps has one; leave it out")
    fields = method_class(run.method).model_fields
    for name in _OF_HEADS & run.settings.keys():
        if run.settings[name] != fields[name].default:
            raise ConfigError(
                f"{name}={run.settings[name]} changes nothing where pixels are told apart, since a decoder takes the "
                "head's place; leave it out"
            )
    from lamina.training.segmentation import Segmentation

    return Segmentation(run.dense)
