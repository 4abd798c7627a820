"""A small model server on a free port: it speaks both chat protocols, and fails as it is told to."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeServer:
    """A context manager; ``reply(question)`` returns a str, or what to do instead.

    That is an int (an HTTP status), bytes (a raw body), or a float (seconds without a reply). ``asked`` has
    every question so far, ``requests`` the path and the body of every request, and
    ``headers`` its headers.
    """

    def __init__(self, reply=lambda question: "yes"):
        self.reply, self.asked, self.requests, self.headers = reply, [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, body))
                outer.headers.append(self.headers)
                question = body["messages"][-1]["content"]
                outer.asked.append(question)
                found = outer.reply(question)
                if isinstance(found, float):
                    outer.hanging.wait(found)
                    return
                status = found if isinstance(found, int) else 200
                self.send_response(status)
                self.end_headers()
                if status != 200:
                    self.wfile.write(b'{"error": "broken on purpose"}')
                elif isinstance(found, bytes):
                    self.wfile.write(found)
                else:
                    self.wfile.write(json.dumps(outer.message(self.path, found)).encode())

            def log_message(self, *_):
                pass

        self.hanging = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @staticmethod
    def message(path, text):
        message = {"role": "assistant", "content": text}
        return (
            {"message": message, "done": True} if path == "/api/chat" else {"choices": [{"message": message}]}
        )

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.hanging.set()
        self.server.shutdown()
        self.server.server_close()


def dripping(port_ready, seconds, stop):
    """A server that sends one byte of its reply every 20 ms and never ends; calls ``port_ready(port)``."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port_ready(listening.getsockname()[1])
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            until = time.monotonic() + seconds
            while time.monotonic() < until and not stop.is_set():
                try:
                    connection.sendall(b" ")
                except OSError:
                    return
                time.sleep(0.02)
