"""The load: distinct signed events, and wrk, which sends each once."""

import hmac
import json
import random
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from processes import PATH, SHARED_SECRET

MOST_EVENTS_PER_SECOND = 25_000

HEAD = (
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Content-Length: {length}\r\nX-Signature: {signature}\r\n\r\n"
)
# As JSON.stringify writes it, 1.1 KB; the values for $ are all of one length.
EVENT = (
    '{"anonymousId":"$user","channel":"client","context":{"ip":"203.0.113.25",'
    '"library":{"name":"analytics.js","version":"next-1.64.0"},"locale":"en-GB",'
    '"page":{"path":"/shop/flowers","referrer":"https://www.example.com/",'
    '"search":"?utm_source=newsletter&utm_campaign=spring",'
    '"title":"Flowers for every day, delivered to your door",'
    '"url":"https://www.example.com/shop/flowers"},"timezone":"Europe/London",'
    '"userAgent":"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 '
    '(KHTML, like Gecko) Chrome/119.0.0.0 Safari/537.36"},"event":"Favorited",'
    '"integrations":{"All":true,"Amplitude":{"session_id":$time}},'
    '"messageId":"ajs-next-$time-$id","originalTimestamp":"2023-11-14T22:13:20.000Z",'
    '"properties":{"itemName":"Roses","price":12.5,"quantity":3,'
    '"tags":["red","seasonal","gift"]},"receivedAt":"2023-11-14T22:13:20.000Z",'
    '"sentAt":"2023-11-14T22:13:20.000Z","timestamp":"2023-11-14T22:13:20.000Z",'
    '"type":"track","userId":"$user","version":2,"writeKey":"bench0123456789abcdef"}'
)


def make_bodies(count: int) -> Iterator[bytes]:
    """Makes distinct ``track`` events, the same ones each time.

    The messageId is analytics.js's: a time, then a UUID, so that ids grow in MongoDB's
    index as they do in life.
    """
    numbers = random.Random(0)
    for index in range(count):
        text = EVENT.replace("$time", str(1_700_000_000_000 + index))
        for name in ("$user", "$id"):
            text = text.replace(name, str(uuid.UUID(int=numbers.getrandbits(128))))
        yield text.encode()


def sign(body: bytes) -> str:
    return hmac.digest(SHARED_SECRET.encode(), body, "sha1").hex()


class Requests:
    """A file of distinct signed requests of one length, so many for each second."""

    def __init__(self, path: Path, seconds: int) -> None:
        self.path = path
        with open(path, "wb") as file:
            for body in make_bodies(MOST_EVENTS_PER_SECOND * seconds):
                head = HEAD.format(path=PATH, length=len(body), signature=sign(body))
                file.write(head.encode() + body)
            self.size = file.tell() // (MOST_EVENTS_PER_SECOND * seconds)

    def send(
        self, port: int, connections: int, first: int, seconds: int, status: int = 200
    ) -> dict[str, float]:
        """Sends those of that many seconds from the first one on; returns what wrk saw.

        Latencies are in seconds, with wrk's correction for what waits for slow answers.
        Raises RuntimeError unless every answer had that status.
        """
        threads = min(2, connections)
        part = (each * MOST_EVENTS_PER_SECOND for each in (first, first + seconds))
        arguments = map(str, (self.path, self.size, *part, status, threads))
        script = str(Path(__file__).with_name("wrk.lua"))
        command = [
            *("wrk", f"-t{threads}", f"-c{connections}", f"-d{seconds}s"),
            *("--timeout", "20s", "--script", script),
            *(f"http://127.0.0.1:{port}/webhook", "--", *arguments),
        ]
        wrk = subprocess.run(command, capture_output=True, text=True, check=False)
        _, found, result = wrk.stdout.partition("RESULT ")
        load: dict[str, float] = json.loads(result) if found else {}
        if load.pop("faults", 1) or not load["acknowledged"]:
            raise RuntimeError(f"{wrk.stdout}{wrk.stderr}")
        return load
