-- wrk's side: sends the signed requests of a file, each once, and checks every answer.
-- Arguments: the file, bytes a request, the first request, the one past the last, the
-- status that acknowledges an event, and the number of threads.
-- The requests are all of one length, so that a thread finds its own slice by seeking.

local threads = {}

function setup(thread)
  thread:set("number", #threads)
  table.insert(threads, thread)
end

function init(arguments)
  local first, last = tonumber(arguments[3]), tonumber(arguments[4])
  local of = tonumber(arguments[6])
  size, expected = tonumber(arguments[2]), tonumber(arguments[5])
  position = first + math.floor((last - first) * number / of)
  stop = first + math.floor((last - first) * (number + 1) / of)
  file = assert(io.open(arguments[1], "rb"))
  file:seek("set", position * size)
  acknowledged, refused, exhausted = 0, 0, 0
end

function request()
  if position == stop then
    exhausted = 1
    wrk.thread:stop()
    return "GET / HTTP/1.1\r\nHost: exhausted\r\n\r\n"
  end
  position = position + 1
  return file:read(size)
end

function response(status)
  if status == expected then
    acknowledged = acknowledged + 1
  else
    refused = refused + 1
  end
end

function done(summary, latency)
  local acknowledged, refused, exhausted = 0, 0, 0
  for _, thread in ipairs(threads) do
    acknowledged = acknowledged + thread:get("acknowledged")
    refused = refused + thread:get("refused")
    exhausted = exhausted + thread:get("exhausted")
  end
  local errors = summary.errors
  print(string.format(
    'RESULT {"acknowledged": %d, "refused": %d, "exhausted": %d, "socket_errors": %d, ' ..
    '"seconds": %.6f, "median": %.6f, "p99": %.6f, "max": %.6f}',
    acknowledged, refused, exhausted,
    errors.connect + errors.read + errors.write + errors.timeout,
    summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6,
    latency.max / 1e6))
end
