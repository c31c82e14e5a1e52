"""A bundle in service: what every route shares, and how another bundle takes its place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import unknown_name
from edgeglm.runtime.finalized import choice_here
from edgeglm.runtime.runner import Runner
from edgeglm.serve.config import ServeConfig
from edgeglm.serve.identity import Identity, identity_of
from edgeglm.serve.models import Model, models_of
from edgeglm.serve.refusals import ForbiddenError, NotFoundError, NotReadyError
from edgeglm.serve.search import GallerySearcher, Searcher

SearcherMaker = Callable[[Bundle, str], Searcher]


class Service:
    """Serves one bundle at a time. Use it as an asynchronous context manager, in one event loop.

    Args:
        bundle: The path of the bundle to begin with.
        config: The server's settings.
        opened: Opens a bundle; ``open_bundle`` with this machine's trust by default.
        searcher: Makes what is searched, of a bundle and a variant; None for the bundle's gallery.

    Attributes:
        runner: Answers. Replaced when all models were unloaded and one is loaded again.
        identity: Which bundle serves now.
        searcher: What is searched; None where the bundle has no gallery and no index was given.
        models: The models by name.
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
        self.draining = False
        self._path, self._open, self._make_searcher = bundle, opened, searcher
        self._changing = asyncio.Lock()
        self._out: dict[str, str] = {}  # models out of service, and why
        self.bundle: Bundle
        self.runner: Runner
        self.identity: Identity
        self.models: dict[str, Model] = {}
        self.searcher: Searcher | None = None

    async def __aenter__(self) -> Service:
        """Verify, load and warm up. Raises UserError for a bundle or an engine that cannot be used."""
        bundle = await asyncio.to_thread(self._open, self._path)
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
        if self.searcher is not None:
            self.searcher.close()
        self.bundle.close()

    @property
    def version(self) -> str:
        """The version of each model: the content digest of its bundle."""
        return self.identity.digest

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return not self.draining and not self.runner.closing and len(self._out) < len(self.models)

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
                await self._change(await asyncio.to_thread(self._open, self._place(bundle)))
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
        listed = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}
        if name not in listed:
            raise NotFoundError(str(unknown_name("bundle", name[:100], listed)))
        return listed[name]

    async def _begin(self, bundle: Bundle) -> None:
        searcher = await asyncio.to_thread(self._searcher, bundle)
        runner = Runner(bundle, self.config.runner)
        try:
            await runner.__aenter__()
            self._adopt(bundle, runner, searcher)
        except BaseException:
            _closed(searcher)
            await runner.close()
            raise

    async def _change(self, fresh: Bundle) -> None:
        former = self.bundle
        try:
            if self.runner.closing:
                await self._begin(fresh)
            else:
                searcher = await asyncio.to_thread(self._searcher, fresh)
                try:
                    # in the very moment of the switch, so that an answer names the bundle it came from
                    await self.runner.swap(fresh, switched=lambda: self._adopt(fresh, self.runner, searcher))
                finally:
                    if self.searcher is not searcher:
                        _closed(searcher)
        finally:
            (former if self.bundle is fresh else fresh).close()

    def _adopt(self, bundle: Bundle, runner: Runner, searcher: Searcher | None) -> None:
        variant, words = runner.serving
        former, self.searcher = self.searcher, searcher
        self.bundle, self.runner = bundle, runner
        self.identity = identity_of(bundle, variant, words)
        self.models = models_of(runner.contracts)
        self._out = {name: why for name, why in self._out.items() if name in self.models}
        _closed(former)

    def _searcher(self, bundle: Bundle) -> Searcher | None:
        """Open what is searched, with the variant that the runner will choose."""
        variant = choice_here(bundle, self.config.runner.variant).variant
        if self._make_searcher is not None:
            return self._make_searcher(bundle, variant)
        if f"gallery/embeddings-{variant}.npy" not in bundle.manifest.files:
            return None
        return GallerySearcher(bundle, variant)

    def require_searcher(self) -> Searcher:
        """Return what is searched. Raises NotFoundError where there is nothing."""
        if self.searcher is None:
            raise NotFoundError("this bundle has no gallery to search; build it with one, or serve an index")
        return self.searcher


def _closed(searcher: Searcher | None) -> None:
    if searcher is not None:
        searcher.close()
