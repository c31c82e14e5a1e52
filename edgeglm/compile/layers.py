"""The layers of a finished plan, as the library's own inspector lists them (IEngineInspector)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeglm.core.errors import UserError
from edgeglm.engines.libraries import Library
from edgeglm.engines.trt_runtime import RuntimeModule, opened_engine


def layer_table(
    module: RuntimeModule, logger: Any, plan: bytes, *, library: Library, options: Mapping[str, bool]
) -> str | None:
    """Return the inspector's JSON, or None where the plan cannot be opened, as on a machine without its GPU.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        logger: Its ILogger.
        plan: The raw plan.
        library: Which library built it.
        options: The builder's flags that were set.
    """
    try:
        opened = opened_engine(module, logger, plan, library=library, options=options)
        if opened is None:
            return None
        _runtime, engine = opened
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(module.LayerInformationFormat.JSON)
    except (
        AttributeError,
        RuntimeError,
        TypeError,
        UserError,
    ):  # the table is a record, and no reason to lose a build
        return None
    return str(text)
