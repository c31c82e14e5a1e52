"""The founding assets by name, and how an asset is written down: ``kind:what@version``."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib import resources
from typing import Annotated, Literal, cast

import msgspec

from edgeglm.core.errors import UserError, unknown_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SpecKind = Literal["pypi", "npm", "hf", "file"]
_SPEC = {
    "pypi": re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*)"),
    "npm": re.compile(r"(?P<name>(@[a-z0-9-][a-z0-9._-]*/)?[a-z0-9-][a-z0-9._-]*)@(?P<version>\d[\w.+-]*)"),
    "hf": re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<version>[\w][\w./-]*))?"),
    "file": re.compile(r"(?P<name>.+)", re.DOTALL),
}
_FORM = {
    "pypi": "pypi:name==version",
    "npm": "npm:name@version",
    "hf": "hf:owner/name or hf:owner/name@revision",
    "file": "file:path",
}


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """One parsed specification. ``version`` is empty where the kind has none."""

    kind: SpecKind
    name: str
    version: str = ""
    sha256: str | None = None

    def __str__(self) -> str:
        """Return the specification as a user writes it."""
        separator = {"pypi": "==", "npm": "@", "hf": "@", "file": ""}[self.kind]
        return f"{self.kind}:{self.name}{separator if self.version else ''}{self.version}"


class Asset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One founding asset: a registry file, its sha256, and what must be said about it.

    ``members`` names inner files of the archive by what they are for.
    """

    spec: str
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, msgspec.Meta(gt=0)]
    title: str
    licence: str
    attribution: str
    url: str
    roles: tuple[str, ...]
    members: dict[str, str]

    @property
    def version(self) -> str:
        """The pinned version of the package."""
        return parse_spec(self.spec).version


@cache
def catalogue() -> dict[str, Asset]:
    """Return every founding asset by name."""
    text = resources.files("edgeglm.assets").joinpath("catalogue.toml").read_text("utf-8")
    return msgspec.convert(tomllib.loads(text), dict[str, Asset])


def asset_named(name: str) -> Asset:
    """Return one founding asset. Raises UserError with the nearest name."""
    found = catalogue().get(name)
    if found is None:
        raise unknown_name("asset", name, catalogue())
    return found


def parse_spec(text: str) -> Spec:
    """Parse ``pypi:name==version``, ``npm:name@version``, ``hf:owner/name[@revision]`` or ``file:path``.

    ``#sha256=<64 hex digits>`` at the end pins a ``pypi:`` or ``npm:`` file. Raises UserError.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in _SPEC:
        raise unknown_name("kind of asset", kind, _SPEC, "write " + ", ".join(_FORM.values()))
    sha256 = None
    if kind in ("pypi", "npm"):
        rest, pinned, sha256_text = rest.partition("#sha256=")
        if pinned and not re.fullmatch("[0-9a-f]{64}", sha256_text):
            raise UserError(f"{text!r} has no sha256 of 64 lower-case hex digits; write #sha256=<digest>")
        sha256 = sha256_text or None
    match = _SPEC[kind].fullmatch(rest)
    if match is None:
        raise UserError(f"cannot read the asset {text!r}; write it as {_FORM[kind]}")
    groups = match.groupdict()
    return Spec(
        kind=cast("SpecKind", kind), name=groups["name"], version=groups.get("version") or "", sha256=sha256
    )
