"""`GET /v1/files/{id}`: a picture by its signed link."""

from __future__ import annotations

import time

from fastapi import APIRouter, Query
from fastapi.responses import Response

from tdm_app.refusal import Refused, refusal
from tdm_app.schemas import ErrorResponse
from tdm_app.store import Store, media_type

LAST_SECOND = 2**40
PICTURE = {"content": {kind: {} for kind in ("image/png", "image/jpeg", "image/webp")}, "description": "The picture."}


def files_router(store: Store) -> APIRouter:
    """Pictures that `response_format: url` and jobs point to."""
    router = APIRouter(prefix="/v1/files", tags=["files"], default_response_class=Response)
    responses = {200: PICTURE, "default": {"model": ErrorResponse}}

    @router.head("/{file_id}", include_in_schema=False)
    @router.get("/{file_id}", responses=responses, response_class=Response)
    async def read_file(  # pyright: ignore[reportUnusedFunction]
        file_id: str, expires: int = Query(0, ge=0, le=LAST_SECOND), signature: str = ""
    ) -> Response:
        """The picture behind a link. 403 without the right signature, 410 when the link or the picture is gone."""
        store.check(file_id, expires, signature)
        data = await store.get(file_id)
        if data is None:
            raise Refused(refusal(410, "picture_gone", "this picture was deleted, since newer ones needed its place"))
        headers = {
            "cache-control": f"private, max-age={max(0, expires - int(time.time()))}, immutable",
            "content-disposition": f'inline; filename="{file_id}"',
            "content-security-policy": "default-src 'none'; sandbox",
            "x-content-type-options": "nosniff",
        }
        return Response(data, media_type=media_type(file_id), headers=headers)

    return router
