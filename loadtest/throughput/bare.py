"""What there is to win: an ASGI function that reads the body and answers, under the gateway's own server settings.

`python -m loadtest.throughput.bare` prints its port.
"""

from __future__ import annotations

import socket
import sys

import uvicorn
from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, Scope

_BODY = (
    b'{"object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"parcels"}}]}'
)


async def answer(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
    """Answer every request alike."""
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BODY))]
    await send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": False})
    await send({"type": "http.response.body", "body": _BODY, "more_body": False})


def main() -> None:
    """Serve until a signal comes."""
    config = uvicorn.Config(
        answer, interface="asgi3", lifespan="off", loop="uvloop", http="httptools", ws="none", log_config=None
    )
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        sys.stdout.write(f"bare ASGI listens on http://127.0.0.1:{listening.getsockname()[1]}\n")
        sys.stdout.flush()
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
