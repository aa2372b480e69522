"""Peer: http.server with one insert_one per request, the plain way to do it.

It sends head and payload in two writes, as whoever follows the documentation: Nagle's
algorithm holds the second one back until the client's delayed ACK, for 40 ms.
"""

import hmac
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pymongo

SECRET = os.environ["SEGMENT_SHARED_SECRET"].encode()
client = pymongo.MongoClient(os.environ["MONGODB_URI"])
collection = client[os.environ["MONGODB_DATABASE"]]["events"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log_message = lambda *_: None

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        signature = self.headers.get("X-Signature", "")
        if not hmac.compare_digest(hmac.digest(SECRET, body, "sha1").hex(), signature):
            return self.answer(401, {"error": "X-Signature does not match the body"})
        event = json.loads(body)
        event["_id"] = event["messageId"]
        collection.insert_one(event)
        self.answer(200, {"insertedId": event["_id"]})

    def answer(self, status, value):
        payload = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


ThreadingHTTPServer.request_queue_size = 1024
ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
