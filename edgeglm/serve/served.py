"""One bundle as requests meet it: engines, names, and what is searched, which go together."""

from __future__ import annotations

from types import TracebackType

from edgeglm.bundle.opened import Bundle
from edgeglm.runtime.runner import Runner
from edgeglm.serve.identity import identity_of
from edgeglm.serve.models import models_of
from edgeglm.serve.refusals import NotFoundError
from edgeglm.serve.search import Searcher


class Served:
    """A bundle in service. A request that searches holds it in a ``with`` statement.

    Another bundle may take its place meanwhile: what is searched stays open until the last request that
    holds it has ended, and so an embedding never meets rows of another space. Used in the event loop alone.

    Args:
        bundle: Opened.
        runner: Serving it.
        searcher: What is searched; None for nothing.
    """

    def __init__(self, bundle: Bundle, runner: Runner, searcher: Searcher | None) -> None:
        self.bundle, self.runner, self.searcher = bundle, runner, searcher
        variant, words = runner.serving
        self.identity = identity_of(bundle, variant, words)
        self.models = models_of(runner.contracts)
        self._holders = 0
        self._retired = False
        self._with_bundle = False

    def __enter__(self) -> Served:
        """Hold it."""
        self._holders += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of it."""
        self._holders -= 1
        self._close_unheld()

    def retire(self, *, with_bundle: bool) -> None:
        """Close what is searched, and the bundle if it is told so, once nobody holds it."""
        self._retired = True
        self._with_bundle = self._with_bundle or with_bundle
        self._close_unheld()

    def require_searcher(self) -> Searcher:
        """Return what is searched. Raises NotFoundError where there is nothing."""
        if self.searcher is None:
            raise NotFoundError("this bundle has no gallery to search; build it with one, or serve an index")
        return self.searcher

    def _close_unheld(self) -> None:
        if not self._retired or self._holders:
            return
        if self.searcher is not None:
            self.searcher.close()
        if self._with_bundle:
            self.bundle.close()
