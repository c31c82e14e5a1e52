"""The layers of a finished plan, as the library's own inspector lists them (IEngineInspector)."""

from __future__ import annotations

from typing import Any


def layer_table(module: Any, logger: Any, plan: bytes) -> str | None:
    """Return the inspector's JSON, or None where the plan cannot be opened, as on a machine without its GPU.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        logger: Its ILogger.
        plan: The raw plan.
    """
    try:
        engine = module.Runtime(logger).deserialize_cuda_engine(plan)
        if engine is None:
            return None
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(module.LayerInformationFormat.JSON)
    except (AttributeError, RuntimeError, TypeError):  # the table is a record, and no reason to lose a build
        return None
    return str(text)
