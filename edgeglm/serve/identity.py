"""Which bundle answers, in every answer: a bug report that quotes one explains itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from edgeglm import __version__
from edgeglm.bundle.opened import Bundle


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What serves.

    Attributes:
        bundle: Its name.
        digest: Its content digest, sha256 in hex. It is also the version of each model.
        target: The target it was made for.
        precision: The variant in service, such as ``int8``.
        plan: sha256 of the bundle's precision plan, which decided its variants; empty if it has none.
        engine: What runs it, in words.
        files: ``{tower: sha256 of its ONNX file}``.
        space: Fingerprint of the embedding space of the variant; empty if the bundle has none.
    """

    bundle: str
    digest: str
    target: str
    precision: str
    plan: str
    engine: str
    files: Mapping[str, str]
    space: str

    @cached_property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers of every answer over HTTP; over gRPC the same are trailing metadata."""
        return [(name.encode(), _header(value).encode()) for name, value in self.pairs]

    @cached_property
    def lines(self) -> bytes:
        """The headers as they travel."""
        return b"".join(b"%s: %s\r\n" % pair for pair in self.headers)

    @cached_property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The same as gRPC takes it."""
        return tuple((name, _header(value)) for name, value in self.pairs)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Header names and values as text."""
        return (
            ("edgeglm-version", __version__),
            ("edgeglm-bundle", self.bundle),
            ("edgeglm-digest", self.digest),
            ("edgeglm-target", self.target),
            ("edgeglm-precision", self.precision),
            *([("edgeglm-plan", self.plan)] if self.plan else []),
        )

    @property
    def facts(self) -> dict[str, object]:
        """The same, and more, for an answer in JSON."""
        return {
            "version": __version__,
            "bundle": self.bundle,
            "digest": self.digest,
            "target": self.target,
            "precision": self.precision,
            "plan": self.plan,
            "engine": self.engine,
            "models": dict(self.files),
            "space": self.space,
        }


def identity_of(bundle: Bundle, variant: str, engine: str) -> Identity:
    """Describe a variant of a bundle, run through ``engine``."""
    manifest, record = bundle.manifest, bundle.variant(variant)
    plan = manifest.files.get("precision_plan.json")
    return Identity(
        bundle=manifest.name,
        digest=manifest.content_digest,
        target=manifest.target.name,
        precision=record.name,
        plan="" if plan is None else plan.sha256,
        engine=engine,
        files={tower: manifest.files[name].sha256 for tower, name in record.files.items()},
        space=manifest.space.fingerprints.get(record.name, ""),
    )


def _header(text: str) -> str:
    """Keep what may stand in a header: a bundle's name is data."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:200]
