"""The Lua scripts that change Redis; store.py runs them.

Everything of one partition changes by two scripts, and only while the stored head is, whole, the
one that was read: `COMMIT` moves the head, `RENEW` makes lists anew under a head that stays
(and `CLEAR` empties a partition that a rebuild holds). Lists
written outside them ended wrong in 349 of 400 simulated failovers (design.md). All keys of a call
but the lists share one hash slot, and all keys are declared.
"""

COMMIT = """
local head = redis.call('GET', KEYS[1]) or ''
if head == ARGV[2] then return 'OK' end
if head ~= ARGV[1] then return head end
redis.call('SET', KEYS[1], ARGV[2])
if ARGV[3] ~= '' then redis.call('RPUSH', KEYS[2], ARGV[3]) end
if ARGV[8] ~= '' then redis.call('ZADD', KEYS[4], ARGV[7], ARGV[8]) end
local ttl = ARGV[4]
local due = redis.call('EXISTS', KEYS[3]) == 1
local key, arg = 5, 9
for _ = 1, tonumber(ARGV[5]) do
  if ARGV[arg] == '' then redis.call('DEL', KEYS[key])
  else redis.call('SET', KEYS[key], ARGV[arg], 'EX', ttl) end
  if ARGV[arg + 2] ~= '' then
    redis.call('HSET', KEYS[3], KEYS[key], ARGV[arg + 2])
    redis.call('EXPIRE', KEYS[key + 1], ttl)
  else
    if ARGV[arg + 1] == '' then redis.call('DEL', KEYS[key + 1])
    else redis.call('SET', KEYS[key + 1], ARGV[arg + 1], 'EX', ttl) end
    if due then redis.call('HDEL', KEYS[3], KEYS[key]) end
  end
  key, arg = key + 2, arg + 3
end
while KEYS[key] do
  for _ = 1, tonumber(ARGV[arg]) do
    redis.call('HINCRBY', KEYS[key], ARGV[arg + 1], ARGV[arg + 2])
    arg = arg + 2
  end
  redis.call('EXPIRE', KEYS[key], ARGV[6])
  key, arg = key + 1, arg + 1
end
return 'OK'
"""
"""KEYS: head, inputs, due, signals, then record and list of each user, then popularity hashes.
ARGV: head expected, head new, inputs entry or '', seconds to keep users, number of users, seconds
to keep popularity, last offset, moves to publish or '', then record, list and due mark of each
user ('' deletes; a mark leaves the list as it is and names what it must answer), then per hash:
count, item, increment, …
Answers OK, or the head that stands there. A head holds its write's batch id, so finding the new
head
means that this very script ran before and the client sent it again.
"""

RENEW = """
local head = redis.call('GET', KEYS[1]) or ''
if head ~= ARGV[1] then return head end
local key, arg = 3, 3
while KEYS[key] do
  local left = math.max(redis.call('PTTL', KEYS[key]), redis.call('PTTL', KEYS[key + 1]))
  if left <= 0 and redis.call('HEXISTS', KEYS[2], KEYS[key]) == 1 then left = ARGV[2] end
  if tonumber(left) > 0 then
    if ARGV[arg] ~= '' then redis.call('SET', KEYS[key], ARGV[arg], 'PX', left) end
    redis.call('SET', KEYS[key + 1], ARGV[arg + 1], 'PX', left)
  end
  redis.call('HDEL', KEYS[2], KEYS[key])
  key, arg = key + 2, arg + 2
end
return 'OK'
"""
"""KEYS: head, due, then record and list of each user. ARGV: head expected, milliseconds to keep
users of whom nothing stands there, then record ('' leaves it) and list of each user.
Running twice changes nothing. What has expired meanwhile stays away, unless a list is due.
"""

CLEAR = """
local head = redis.call('GET', KEYS[1]) or ''
if head ~= ARGV[1] then return head end
for at = 2, #KEYS do redis.call('DEL', KEYS[at]) end
return 'OK'
"""
"""Delete what a rebuild finds in its way. KEYS: head, then keys of its partition. ARGV: head
expected.
"""

SWITCH = """
local stored = redis.call('GET', KEYS[1]) or ''
if stored == ARGV[2] then return 1 end
if stored ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
"""Change `<ns>:meta` if it is still what was read. ARGV: expected ('' for none), new."""

CARRY = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local key, arg = 3, 1
while KEYS[key] do
  local keep = tonumber(ARGV[arg])
  for at = 0, 1 do
    local value = ARGV[arg + 1 + at]
    if value ~= '' and keep > 0 then redis.call('SET', KEYS[key + at], value, 'PX', keep)
    elseif value ~= '' then redis.call('SET', KEYS[key + at], value) end
  end
  if ARGV[arg + 3] ~= '' then redis.call('HSET', KEYS[2], KEYS[key], ARGV[arg + 3]) end
  key, arg = key + 2, arg + 4
end
return 1
"""
"""Put users of an earlier epoch into a partition that has no head yet: nobody folds it before all
are there. KEYS: head, due, then record and list of each user. ARGV, per user: milliseconds to keep
(0: no end), record, list, due mark; '' leaves it out. Running twice changes nothing.
"""

UNAVAILABLE = """
local total = tonumber(redis.call('GET', KEYS[2]) or '-1')
if total > tonumber(ARGV[2]) then return 0 end
if total ~= tonumber(ARGV[1]) then
  redis.call('DEL', KEYS[1])
  for i = tonumber(ARGV[3]) + 4, #ARGV do redis.call('SADD', KEYS[1], ARGV[i]) end
else
  for i = 4, tonumber(ARGV[3]) + 3 do
    local id = string.sub(ARGV[i], 2)
    if string.sub(ARGV[i], 1, 1) == '-' then redis.call('SADD', KEYS[1], id)
    else redis.call('SREM', KEYS[1], id) end
  end
end
redis.call('SET', KEYS[2], ARGV[2])
return 1
"""
"""Keep `<ns>:unavailable`. A worker that is behind writes nothing; one that finds another history
than its
own writes the whole set. KEYS: set, version. ARGV: version expected, new, number of changes,
changes
('-id' gone, '+id' back), then the whole set.
"""
