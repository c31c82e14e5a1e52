"""The protocol's methods over gRPC."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from edgeglm import __version__
from edgeglm.core.errors import UserError
from edgeglm.serve.grpc_messages import check_wanted, infer_response, message
from edgeglm.serve.grpc_stream import answers_in_order
from edgeglm.serve.grpc_wire import Asked, asked_from_bytes, asked_from_message, bytes_of_answer
from edgeglm.serve.models import Model, Outputs, answers, model_config, model_metadata
from edgeglm.serve.refusals import NotFoundError, NotReadyError, words_of
from edgeglm.serve.service import Service
from edgeglm.serve.v2_routes import EXTENSIONS, bundle_asked, model_statistics, repository_index


class Methods:
    """Each takes the request and gRPC's context, and returns the answer."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def named(self, name: str) -> Callable[[Any, Any], Awaitable[Any]]:
        """Return the method that the protocol calls ``name``, such as ModelInfer."""
        method: Callable[[Any, Any], Awaitable[Any]] = getattr(
            self, re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()
        )
        return method

    async def server_live(self, request: Any, context: Any) -> Any:
        """Say that the process answers, unless only another one can."""
        return message("ServerLiveResponse")(live=not self._service.why_lost)

    async def server_ready(self, request: Any, context: Any) -> Any:
        """Say whether requests are answered."""
        return message("ServerReadyResponse")(ready=self._service.ready)

    async def model_ready(self, request: Any, context: Any) -> Any:
        """Say whether a model is in service; one that is unknown is not."""
        try:
            self._service.model(request.name, request.version)
        except (NotFoundError, NotReadyError):
            return message("ModelReadyResponse")(ready=False)
        return message("ModelReadyResponse")(ready=self._service.ready)

    async def server_metadata(self, request: Any, context: Any) -> Any:
        """Say what the server is; which bundle it serves is in the trailing metadata of every call."""
        return message("ServerMetadataResponse")(name="edgeglm", version=__version__, extensions=EXTENSIONS)

    async def model_metadata(self, request: Any, context: Any) -> Any:
        """Say what a model takes and gives."""
        model = self._service.known(request.name, request.version)
        return message("ModelMetadataResponse")(**model_metadata(model, self._service.version))

    async def model_config(self, request: Any, context: Any) -> Any:
        """Say the same in Triton's words."""
        model = self._service.known(request.name, request.version)
        config = model_config(model, self._service.config.max_rows)
        return message("ModelConfigResponse")(config=config)

    async def model_statistics(self, request: Any, context: Any) -> Any:
        """Count rows and calls, of one model or of all."""
        names = [request.name] if request.name else list(self._service.models)
        if request.name:
            self._service.known(request.name, request.version)
        stats = model_statistics(self._service, names)["model_stats"]
        answer = message("ModelStatisticsResponse")()
        for entry in stats:
            batches = entry.pop("batch_stats")
            added = answer.model_stats.add(**entry)
            for batch in batches:
                added.batch_stats.add(batch_size=batch["batch_size"]).compute_infer.count = batch["count"]
        return answer

    async def repository_index(self, request: Any, context: Any) -> Any:
        """List the models."""
        models = repository_index(self._service, ready_only=request.ready)
        return message("RepositoryIndexResponse")(models=models)

    async def repository_model_load(self, request: Any, context: Any) -> Any:
        """Put a model in service, from another bundle if the parameters name one."""
        texts = {}
        for name, value in request.parameters.items():
            if name not in ("config", "bundle") or value.WhichOneof("parameter_choice") != "string_param":
                raise UserError(f"parameter {name[:40]!r} is not known; give 'bundle' or 'config' as text")
            texts[name] = value.string_param
        await self._service.load(request.model_name, bundle_asked(texts.get("config"), texts.get("bundle")))
        return message("RepositoryModelLoadResponse")()

    async def repository_model_unload(self, request: Any, context: Any) -> Any:
        """Take a model out of service."""
        await self._service.unload(request.model_name)
        return message("RepositoryModelUnloadResponse")()

    async def model_infer(self, request: bytes, context: Any) -> bytes:
        """Answer one request, from bytes to bytes; gRPC's own deadline counts as the request's."""
        asked = asked_from_bytes(request, self._service.model)
        return bytes_of_answer(asked, *await self._inferred(asked, context.time_remaining() or None))

    async def stream_infer(self, requests: Any, context: Any) -> AsyncGenerator[Any, None]:
        """Answer the requests of a stream, in their order; errors travel as messages and end nothing.

        Raises what ``answers_in_order`` does.
        """
        service = self._service
        answering = answers_in_order(
            requests,
            self._streamed,
            stopping=service.stopping,
            silent_for=service.config.idle_timeout,
            unread_for=service.config.send_timeout,
        )
        async with contextlib.aclosing(answering) as answers:
            async for answer in answers:
                yield answer

    async def _streamed(self, request: Any) -> Any:
        answer = message("ModelStreamInferResponse")()
        size, reserved = request.ByteSize(), 0
        try:
            self._service.budget.reserve(size)
            reserved = size
            asked = asked_from_message(request, self._service.model)
            answer.infer_response.CopyFrom(infer_response(request, *await self._inferred(asked, None)))
            if "triton_enable_empty_final_response" in request.parameters:
                answer.infer_response.parameters["triton_final_response"].bool_param = True
        except Exception as error:
            answer.error_message = words_of(error)
            answer.infer_response.id = request.id
        finally:
            self._service.budget.release(reserved)
        return answer

    async def _inferred(self, asked: Asked, remaining: float | None) -> tuple[Model, str, Outputs, list[str]]:
        """Return the model, its version, its outputs and which of them are wanted."""
        service, request, deadline = self._service, asked.request, asked.deadline
        model = service.model(request.model_name, request.model_version)
        wanted = check_wanted(request, model)
        if remaining is not None:
            deadline = remaining if deadline is None else min(deadline, remaining)
        served = service.served
        outputs = await answers(
            served.runner,
            model,
            asked.arrays,
            max_rows=service.config.max_rows,
            deadline=deadline,
            priority=asked.priority,
        )
        return model, served.identity.digest, outputs, wanted
