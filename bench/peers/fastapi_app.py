"""Peer: FastAPI with pymongo's AsyncMongoClient; uvicorn runs it with uvloop."""

import hmac
import json
import os

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pymongo import AsyncMongoClient

SECRET = os.environ["SEGMENT_SHARED_SECRET"].encode()
client = AsyncMongoClient(os.environ["MONGODB_URI"])
collection = client[os.environ["MONGODB_DATABASE"]]["events"]
app = FastAPI()


@app.post("/webhook")
async def webhook(request: Request):
    body = await request.body()
    digest = hmac.digest(SECRET, body, "sha1").hex()
    if not hmac.compare_digest(digest, request.headers.get("X-Signature", "")):
        return JSONResponse({"error": "X-Signature does not match the body"}, 401)
    event = json.loads(body)
    event["_id"] = event["messageId"]
    await collection.insert_one(event)
    return JSONResponse({"insertedId": event["_id"]})
