"""A local endpoint that answers as it is told, for the tests of the judge."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, **choice):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, **choice}]}, {}


class Stub:
    """`answer` is called with each request's body and returns (status, body, headers), or seconds to wait."""

    def __init__(self, answer):
        self.answer, self.requests, self.headers = answer, [], []
        self.url = ""

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.requests.append(body)
        self.headers.append(dict(handler.headers))
        found = self.answer(body)
        if isinstance(found, float):
            time.sleep(found)
            return
        status, content, headers = found
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


@contextmanager
def serving(answer):
    stub = Stub(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.paths.append(self.path)
            stub.handle(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.paths = stub.paths = []
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
