-- wrk's side: sends the signed requests of a file, each once, and checks every answer.
-- Arguments: the file, bytes a request, the first request, the one past the last, the
-- status that acknowledges an event, and the number of threads.

local threads = {}

function setup(thread)
  thread:set("number", #threads)
  table.insert(threads, thread)
end

function init(arguments)
  local first, last = tonumber(arguments[3]), tonumber(arguments[4])
  left = math.floor((last - first) / tonumber(arguments[6]))
  size, expected = tonumber(arguments[2]), tonumber(arguments[5])
  file = assert(io.open(arguments[1], "rb"))
  file:seek("set", (first + left * number) * size) -- each thread has its own part
  acknowledged, refused = 0, 0
end

function request()
  left = left - 1
  if left < 0 then -- no events are left: the answer to this counts as refused
    return "GET /see-MOST_EVENTS_PER_SECOND HTTP/1.1\r\nHost: localhost\r\n\r\n"
  end
  return file:read(size)
end

function response(status)
  if status == expected then acknowledged = acknowledged + 1 else refused = refused + 1 end
end

function done(summary, latency)
  local errors = summary.errors
  local acknowledged = 0
  local faults = errors.connect + errors.read + errors.write + errors.timeout
  for _, thread in ipairs(threads) do
    acknowledged = acknowledged + thread:get("acknowledged")
    faults = faults + thread:get("refused")
  end
  print(string.format(
    'RESULT {"acknowledged":%d,"faults":%d,"per_second":%f,"p50":%f,"p99":%f}',
    acknowledged, faults, acknowledged / summary.duration * 1e6,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
