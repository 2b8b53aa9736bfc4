"""A server that speaks NDIF's protocol on 127.0.0.1, for one model folder.

    python ndif_stand_in.py PORT FOLDER

The real server (the package ndif) needs Python 3.12, Redis and an object store. This one is made of
nnsight's own parts for the server's side, and cannot import the workbench: what arrives must bring
everything along.
"""

import asyncio
import sys
import traceback

import torch
import uvicorn
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from transformers import AutoTokenizer

for package in ("workbench", "probes", "toy_tasks", "app"):
    sys.modules[package] = None  # importing it is an error

PORT, FOLDER = int(sys.argv[1]), sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = TransformersModel(FOLDER, task="text-generation", tokenizer=tokenizer)
model.dispatch()
updates: "asyncio.Queue[bytes | str]" = asyncio.Queue()


def execute(blob: bytes, compress: bool) -> bytes:
    """Run a request against the model; the bytes of its result."""
    import io

    import zstandard

    tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress)
    with torch.no_grad():
        tracer.execute(tracer.info.code)
    saved = {
        name: value
        for name, value in tracer.info.frame.f_locals.items()
        if name in ("found", "logits")
    }
    file = io.BytesIO()
    torch.save(saved, file)
    return zstandard.compress(file.getvalue()) if compress else file.getvalue()


async def request(received):
    """POST /request."""
    form = await received.form()
    about = RequestModel.model_validate_json(form["data"])
    answer = {"id": "1"}
    try:
        assert about.model_key.startswith("nnsight."), about.model_key
        content = execute(await form["blob"].read(), about.compress)
        done = ResponseModel(**answer, status=Status.COMPLETED, data=content)
        await updates.put(done.pickle())
    except Exception:
        text = traceback.format_exc()
        failed = ResponseModel(**answer, status=Status.ERROR, description=text)
        await updates.put(failed.model_dump_json())
    return JSONResponse({**answer, "status": "RECEIVED"})


async def subscribe(socket):
    """The websocket /subscribe."""
    await socket.accept()
    await socket.send_json({"session_id": "one"})
    update = await updates.get()
    await (socket.send_bytes if isinstance(update, bytes) else socket.send_text)(update)


async def ready(received):
    """GET /ready."""
    return JSONResponse({})


app = Starlette(
    routes=[
        Route("/request", request, methods=["POST"]),
        Route("/ready", ready),
        WebSocketRoute("/subscribe", subscribe),
    ]
)
uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning")
