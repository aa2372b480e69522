"""A TCP proxy on loopback that passes every byte on after a delay, as distance does.

Arguments: port to listen on, port to pass on to, seconds of delay in each direction.
"""

import asyncio
import contextlib
import sys

LISTEN, TARGET, DELAY = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])


async def passes_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads on while earlier bytes are under way: this delays, it does not slow down."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 18):
            loop.call_later(DELAY, writer.write, data)
    loop.call_later(DELAY, writer.close)


async def accepts(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", TARGET)
    except OSError:
        writer.close()
        return
    await asyncio.gather(passes_on(reader, far_writer), passes_on(far_reader, writer))


async def main() -> None:
    server = await asyncio.start_server(accepts, "127.0.0.1", LISTEN, backlog=1024)
    await server.serve_forever()


asyncio.run(main())
