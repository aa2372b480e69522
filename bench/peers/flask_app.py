"""Peer: Flask; gunicorn runs it with 2 processes of 8 threads."""

import hmac
import os

import pymongo
from flask import Flask, request

SECRET = os.environ["SEGMENT_SHARED_SECRET"].encode()
client = pymongo.MongoClient(os.environ["MONGODB_URI"])
collection = client[os.environ["MONGODB_DATABASE"]]["events"]
app = Flask(__name__)


@app.post("/webhook")
def webhook():
    digest = hmac.digest(SECRET, request.get_data(), "sha1").hex()
    if not hmac.compare_digest(digest, request.headers.get("X-Signature", "")):
        return {"error": "X-Signature does not match the body"}, 401
    event = request.get_json()
    event["_id"] = event["messageId"]
    collection.insert_one(event)
    return {"insertedId": event["_id"]}
