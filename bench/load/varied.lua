-- HTTP/1.1 load that repeats as little as real traffic does: 50 paths with ids, 8 headers of which 3 are different in every request.
-- Arguments after "--": the value of Host. Prints one line of JSON at the end, read by bench.load.wrk.
local kinds = { "users", "orders", "carts", "items", "search" }
local parts, count, host = {}, 0, "service"

function init(args)
  host = args[1] or host
  local n = 0
  for i = 1, 10 do
    for _, kind in ipairs(kinds) do
      n = n + 1
      parts[n] = "GET /api/" .. kind .. "/" .. (100000 + 7919 * n) .. "/detail HTTP/1.1\r\nHost: " .. host
        .. "\r\nUser-Agent: bench/1.0\r\nAccept: application/json\r\nAccept-Encoding: identity\r\nX-Tenant: tenant-" .. (n % 7) .. "\r\n"
    end
  end
end

function request()
  count = count + 1
  return parts[count % 50 + 1]
    .. string.format("X-Request-Id: %08x-4a1b-4c2d-8e3f-%012x\r\nTraceparent: 00-%032x-%016x-01\r\nX-Timestamp: 17%011d\r\n\r\n",
      count * 2654435 % 4294967296, count, count * 7919, count, count)
end

function done(summary, latency, requests)
  io.write(string.format(
    '{"requests": %d, "duration_us": %d, "connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d, "mean_us": %.1f, "p50_us": %d, "p99_us": %d}\n',
    summary.requests, summary.duration, summary.errors.connect, summary.errors.read, summary.errors.write, summary.errors.status,
    summary.errors.timeout, latency.mean, latency:percentile(50), latency:percentile(99)))
end
