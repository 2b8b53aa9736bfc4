"""The connection of a browser to the server without the browser: what a page sends is received, not drawn.

Twenty of them cost the server what twenty browsers cost it, and this machine a small part of that.
"""

from contextlib import contextmanager
from urllib.parse import urlencode, urlsplit

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.sync.client import connect

PATIENCE_SECONDS = 180.0


class Connection:
    """One person's tab, as the server knows it."""

    def __init__(self, socket):
        self._socket = socket

    def view(self, path="", **query):
        """Open a page and wait for its end; returns its elements, by kind.

        Asserts that the run ended well and that none of the elements is an exception.
        """
        asked = BackMsg()
        asked.rerun_script.query_string = urlencode(query)
        asked.rerun_script.page_name = path
        self._socket.send(asked.SerializeToString())
        kinds = {}
        while True:
            message = ForwardMsg()
            message.ParseFromString(self._socket.recv(timeout=PATIENCE_SECONDS))
            kind = message.WhichOneof("type")
            if kind == "delta" and message.delta.WhichOneof("type") == "new_element":
                element = message.delta.new_element
                kinds.setdefault(element.WhichOneof("type"), []).append(element)
            if kind == "script_finished":
                assert message.script_finished == ForwardMsg.FINISHED_SUCCESSFULLY, path
                assert "exception" not in kinds, kinds["exception"]
                return kinds


@contextmanager
def connected(server):
    """A connection as a browser opens it."""
    address = f"ws://{urlsplit(server.url).netloc}/_stcore/stream"
    # Figures of many cells are messages of megabytes.
    with connect(
        address, origin=server.url, subprotocols=["streamlit"], max_size=None, open_timeout=60
    ) as socket:
        yield Connection(socket)
