"""What each reader takes without a word, before it is damaged."""

import hashlib
import io
import json
import os
import socket
import zipfile

import numpy as np
import safetensors.numpy

from tests.store.conftest import build_result


def _safetensors(**arrays):
    return safetensors.numpy.save(arrays)


TOKENS = [
    _safetensors(tokens=np.arange(12).reshape(3, 4)),
    _safetensors(tokens=np.ones((2, 3), np.int32), attention_mask=np.ones((2, 3), np.int64)),
    _safetensors(tokens=np.ones((2, 3), np.float32)),
]
ROWS = [
    {"text": "one two"},
    {"question": "q?", "choices": ["a", "b"], "answer": 1},
    {"tokens": [1, 2, 3]},
    {"text": "a", "items": ["a"], "label": 0},
    {"state": [1, 2], "target": 3},
]
PLANS = [
    {
        "models": ["demo"],
        "probes": {"attention-sinks": {"threshold": [0.2, 0.3]}},
        "data": "builtin:natural",
        "seeds": [0, 1],
        "n_pos": 16,
        "limit": 2,
        "interventions": ["none", {"name": "zerotuning", "gamma": 2.0}],
    },
    {"models": "demo", "probes": ["successor-heads"], "dtypes": ["float32"], "bos": "auto"},
]
FILES_OF_INTERVENTIONS = [
    {"name": "zerotuning", "version": 1, "gamma": 1.5, "mode": "score", "heads": [[0, 1]]},
    {
        "name": "act",
        "alpha": 5,
        "beta": 0.4,
        "protect_first": True,
        "mode": "full",
        "heads": [[1, 0]],
    },
    {"name": "scale-keys", "factor": 0.5, "positions": [0, 3], "heads": None},
    {"name": "zero-heads", "heads": [[0, 0]], "model": "tiny", "revision": "r", "layers": 2},
    {"name": "move-to-first", "heads": [[0, 0]], "calibration": {"task": "x", "n": 3}},
    {"name": "mean-heads", "heads": [[0, 0]], "mean": "none.safetensors"},
    {"name": "add-vector", "site": "L0.resid_post", "vector": "none.safetensors", "scale": 2.0},
]
TASKS = [
    {
        "name": "a",
        "prompt": "{text}:",
        "labels": [" x", " y"],
        "answer": "label",
        "instruction": "i",
    },
    {"name": "b", "prompt": "{question}\n{choices}", "labels": "letters", "answer": "answer"},
]
RESULT = build_result(1)
DOCUMENT = RESULT.document()
MANIFEST = {
    "schema": 1,
    "files": {
        "arrays.safetensors": {"size": 192, "sha256": "a" * 64},
        "result.json": {"size": 300, "sha256": "b" * 64},
    },
}
ARRAYS = [
    _safetensors(score=np.zeros((2, 3, 4), np.float32)),
    _safetensors(a=np.zeros(0), b=np.ones(2, bool)),
]


def archive():
    """A result as a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        document = json.dumps(DOCUMENT).encode()
        listed = {"arrays.safetensors": ARRAYS[0], "result.json": document}
        sizes = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in listed.items()
        }
        for name, data in (
            *listed.items(),
            ("manifest.json", json.dumps({"schema": 1, "files": sizes})),
        ):
            opened.writestr(f"{RESULT.key}/{name}", data)
    return buffer.getvalue()


CELL = {
    "key": "c" * 64,
    "probe": "attention-sinks",
    "model": "demo",
    "data": "builtin:natural",
    "settings": {"threshold": 0.2},
    "options": {"seed": 1, "n_pos": 16, "limit": 2},
}
OUTCOME = {"cell": "c" * 64, "status": "computed", "result": RESULT.key, "seconds": 1.5}
PROGRESS = {
    "total": 2,
    "done": 1,
    "cached": 0,
    "computed": 1,
    "failed": 0,
    "running": {"c" * 64: {"worker": "1", "host": "h", "done": 1, "total": 3}},
    "started": 1.5e9,
    "updated": 1.5e9 + 60,
    "ended": False,
    "seconds_left": 3.0,
    "process": {"host": socket.gethostname(), "pid": os.getpid(), "birth": "1"},
}
SWEEP = {
    "plan.json": [{"key": "a" * 64, "plan": PLANS[0], "resolved": {}, "cells": [CELL]}],
    "progress.json": [PROGRESS, {**PROGRESS, "process": {"host": "elsewhere", "pid": 1}}],
    "outcomes.jsonl": [OUTCOME],
    "failures.jsonl": [{**OUTCOME, "status": "failed", "error": "no", "asked": CELL}],
}
NOW = "2026-01-01T00:00:00+00:00"
JOBS = {
    "request.json": [{"kind": "run", "name": "x", "arguments": ["run"], "created": NOW}],
    "status.json": [{"state": "done", "pid": 1, "birth": "2", "finished": NOW}],
    "out.json": [{"key": "a" * 64}],
}
