"""The server that people write first: FastAPI around a stock diffusers pipeline, and one lock."""

from __future__ import annotations

import argparse
import base64
import io
import os
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads; the server beside it does the same

import torch
import uvicorn
from diffusers import ZImagePipeline
from fastapi import FastAPI
from pydantic import BaseModel


class Body(BaseModel):
    prompt: str
    seed: int = 0


def create_app(folder: Path, text_tokens: int, side: int) -> FastAPI:
    pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    app, lock = FastAPI(), threading.Lock()

    @app.post("/v1/images/generations")
    def generate(body: Body) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        seeded = torch.Generator("cpu").manual_seed(body.seed)
        with lock:
            [image] = pipe(
                body.prompt, num_inference_steps=4, guidance_scale=0.0, width=side, height=side, generator=seeded,
                max_sequence_length=text_tokens,
            ).images  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return {"created": int(time.time()), "data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what `tdm-serve convert` wrote")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--side", type=int, default=128)
    args = parser.parse_args()
    uvicorn.run(create_app(args.folder, args.text_tokens, args.side), port=args.port, log_level="warning")
