"""Forms as a browser or ``curl -F`` sends them, and what is said of broken ones."""

from __future__ import annotations

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from edgeglm.core.errors import UserError
from edgeglm.serve.refusals import TooLargeError

_MOST = 64  # files, and text fields
_LONGEST = 1 << 20  # bytes of a text field


async def form_of(request: Request) -> tuple[dict[str, list[str]], list[bytes]]:
    """Read a form: text fields, and the files of the fields ``image``.

    Raises UserError for what is no form or has other fields, TooLargeError for too many or too large ones.
    """
    fields: dict[str, list[str]] = {}
    pictures = []
    try:
        async with request.form(max_files=_MOST, max_fields=_MOST, max_part_size=_LONGEST) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) != (name == "image"):
                    raise UserError(f"form field {name[:40]!r} is not known like that; send files as 'image'")
                if isinstance(value, UploadFile):
                    pictures.append(await value.read())
                else:
                    fields.setdefault(name, []).append(value)
    except HTTPException as error:  # the parser's
        raise _told(error.detail) from None
    return fields, pictures


def _told(parsers: str) -> UserError:
    words = parsers.lower()
    if "boundary" in words:
        return UserError("the form's Content-Type names no boundary; let the client make the header")
    if "exceeded" in words:
        return TooLargeError(f"a text field of the form is over {_LONGEST} bytes; send files as 'image'")
    if "too many" in words:
        return TooLargeError(f"the form has over {_MOST} files or text fields; send several requests")
    if "content-disposition" in words:
        return UserError("a part of the form has no name; call it 'text' or 'image'")
    return UserError("the body is no multipart form; send one as 'curl -F image=@photo.jpg' does")
