"""A bundle in service: what every route shares, and how another bundle takes its place."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import unknown_name
from edgeglm.runtime.finalized import choice_here
from edgeglm.runtime.runner import Runner
from edgeglm.serve.budget import Budget
from edgeglm.serve.config import ServeConfig
from edgeglm.serve.identity import Identity
from edgeglm.serve.models import Model
from edgeglm.serve.refusals import ForbiddenError, NotFoundError, NotReadyError
from edgeglm.serve.search import GallerySearcher, Searcher
from edgeglm.serve.served import Served

T = TypeVar("T")
SearcherMaker = Callable[[Bundle, str], Searcher]


class Service:
    """Serves one bundle at a time. Use it as an asynchronous context manager, in one event loop.

    Args:
        bundle: The path of the bundle to begin with.
        config: The server's settings.
        opened: Opens a bundle; ``open_bundle`` with this machine's trust by default.
        searcher: Makes what is searched, of a bundle and a variant; None for the bundle's gallery.

    Attributes:
        budget: The bytes of requests that are held.
        crowded: How many were refused for want of a place, by what was full: "requests", "calls" (of gRPC) or
            "connections".
        stopping: Set once the server was told to stop: what was accepted is answered, and no more.
    """

    def __init__(
        self,
        bundle: Path,
        config: ServeConfig | None = None,
        *,
        opened: Callable[[Path], Bundle] = open_bundle,
        searcher: SearcherMaker | None = None,
    ) -> None:
        self.config = config or ServeConfig()
        self.started = time.time()
        self.stopping = asyncio.Event()
        self._path, self._open, self._make_searcher = bundle, opened, searcher
        self._changing = asyncio.Lock()
        self._out: dict[str, str] = {}  # models out of service, and why
        self.budget = Budget(self.config.max_buffered)
        self.crowded: Counter[str] = Counter()
        self._served: Served | None = None

    async def __aenter__(self) -> Service:
        """Verify, load and warm up. Raises UserError for a bundle or an engine that cannot be used."""
        bundle = await _made(lambda: self._open(self._path), Bundle.close)
        try:
            await self._begin(bundle)
        except BaseException:
            bundle.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Answer what was accepted, then close."""
        await self.runner.close()
        self.served.retire(with_bundle=True)

    @property
    def served(self) -> Served:
        """What serves now. A request takes it once, so that all of its answer is of one bundle."""
        assert self._served is not None, "use the service in an 'async with' statement"
        return self._served

    @property
    def bundle(self) -> Bundle:
        """The bundle in service."""
        return self.served.bundle

    @property
    def runner(self) -> Runner:
        """What answers now. Replaced when all models were unloaded and one is loaded again."""
        return self.served.runner

    @property
    def identity(self) -> Identity:
        """Which bundle serves now."""
        return self.served.identity

    @property
    def models(self) -> dict[str, Model]:
        """The models by name."""
        return self.served.models

    @property
    def version(self) -> str:
        """The version of each model: the content digest of its bundle."""
        return self.identity.digest

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return not self.why_not_ready

    @property
    def why_not_ready(self) -> str:
        """Why requests are not answered; empty where they are."""
        if self.stopping.is_set() or self.runner.closing:
            return "the server is stopping; try another one"
        if len(self._out) == len(self.models):
            return "all models were unloaded; load one"
        return self.runner.broken

    @property
    def why_lost(self) -> str:
        """Why this process is to be started anew; empty where it is not, as while it only loads or stops."""
        return self.runner.lost

    def model(self, name: str, version: str = "") -> Model:
        """Return a model that is in service.

        Raises NotFoundError for an unknown one, or another version; NotReadyError for one that was unloaded.
        """
        model = self.known(name, version)
        if name in self._out:
            raise NotReadyError(f"model {name!r} is {self._out[name]}; load it first")
        return model

    def known(self, name: str, version: str = "") -> Model:
        """Return a model, in service or not. Raises NotFoundError."""
        model = self.models.get(name)
        if model is None:
            raise NotFoundError(str(unknown_name("model", name[:100], self.models)))
        if version and version != self.identity.digest:
            raise NotFoundError(
                f"model {name!r} has no version {version[:80]!r}; the one in service is "
                f"{self.identity.digest}, or leave the version out"
            )
        return model

    def states(self) -> dict[str, str]:
        """Return ``{model: why it is out of service, or nothing}``."""
        return {name: self._out.get(name, "") for name in self.models}

    async def unload(self, name: str) -> None:
        """Take a model out of service; with the last one the engines are given back too."""
        self._controlled()
        async with self._changing:
            self.known(name)
            self._out[name] = "unloaded"
            if len(self._out) == len(self.models):
                await self.runner.close()

    async def load(self, name: str, bundle: str | None = None) -> None:
        """Put a model in service, from another bundle if one is named.

        A bundle is changed as a whole, since its towers share one space; the former one answers what it
        holds. Raises NotFoundError for a bundle that the folder of bundles does not have, UserError for one
        that cannot be used: the former then goes on.
        """
        self._controlled()
        async with self._changing:
            self.known(name)
            if bundle is not None:
                place = self._place(bundle)
                await self._change(await _made(lambda: self._open(place), Bundle.close))
            elif self.runner.closing:
                await self._begin(self.bundle)
            self._out.pop(name, None)

    def _controlled(self) -> None:
        if not self.config.control:
            raise ForbiddenError("this server loads and unloads nothing; start it with --control")

    def _place(self, name: str) -> Path:
        """Find a bundle by its name in the folder: a name that is listed can be no path out of it."""
        folder = self.config.bundles
        if folder is None:
            raise ForbiddenError("this server has no folder of bundles; start it with --bundles FOLDER")
        try:
            listed = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}
        except OSError as error:  # a medium that is not mounted, say
            raise NotReadyError(
                f"cannot list the folder of bundles: {error.strerror}; mount it or make it readable"
            ) from error
        if name not in listed:
            raise NotFoundError(str(unknown_name("bundle", name[:100], listed)))
        return listed[name]

    async def _begin(self, bundle: Bundle) -> None:
        searcher = await _made(lambda: self._searcher(bundle), _closed)
        runner = Runner(bundle, self.config.runner)
        try:
            await runner.__aenter__()
            self._adopt(Served(bundle, runner, searcher))
        except BaseException:
            _closed(searcher)
            await runner.close()
            raise

    async def _change(self, fresh: Bundle) -> None:
        try:
            if self.runner.closing:
                await self._begin(fresh)
                return
            searcher = await _made(lambda: self._searcher(fresh), _closed)
            runner = self.runner
            try:
                # in the very moment of the switch, so that an answer names the bundle it came from
                with self.served:  # the former engines drain beside their bundle
                    await runner.swap(fresh, switched=lambda: self._adopt(Served(fresh, runner, searcher)))
            finally:
                if self.bundle is not fresh:
                    _closed(searcher)
        finally:
            if self.bundle is not fresh:
                fresh.close()

    def _adopt(self, fresh: Served) -> None:
        former, self._served = self._served, fresh
        self._out = {name: why for name, why in self._out.items() if name in fresh.models}
        if former is not None:
            former.retire(with_bundle=former.bundle is not fresh.bundle)

    def _searcher(self, bundle: Bundle) -> Searcher | None:
        """Open what is searched, with the variant that the runner will choose."""
        variant = choice_here(bundle, self.config.runner.variant).variant
        if self._make_searcher is not None:
            return self._make_searcher(bundle, variant)
        if f"gallery/embeddings-{variant}.npy" not in bundle.manifest.files:
            return None
        return GallerySearcher(bundle, variant)


async def _made(make: Callable[[], T], close: Callable[[T], None]) -> T:
    """Make something in a thread. A caller who gives up ends no thread: what it made is closed then.

    It is waited for, so that of a caller who tries again and again no more than one is ever being made; one
    who is cancelled while waiting leaves, and it is closed all the same.
    """
    making = asyncio.ensure_future(asyncio.to_thread(make))

    def left(made: asyncio.Future[T]) -> None:
        with suppress(Exception):  # which nobody waits for
            close(made.result())

    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(left)
        with suppress(Exception):
            await asyncio.shield(making)
        raise


def _closed(searcher: Searcher | None) -> None:
    if searcher is not None:
        searcher.close()
