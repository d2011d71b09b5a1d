-- Load is kept as sums over ranks: what a group asks for needs the same room on any number of ranks. Rows
-- of single ranks, which no release has written, are dropped.
DROP TABLE windows;

CREATE TABLE windows (
    group_name TEXT NOT NULL,
    -- Digest of the group's model: another one has other experts.
    model TEXT NOT NULL,
    -- What a row covers: a 'window', or the windows of an 'hour'.
    span TEXT NOT NULL,
    -- Milliseconds since 1970.
    end_ms INTEGER NOT NULL,
    layer INTEGER NOT NULL,
    phase TEXT NOT NULL,
    -- The ranks whose engines called: bit r % 8 of byte r / 8.
    ranks BLOB NOT NULL,
    calls INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    distinct_experts INTEGER NOT NULL,
    latency_us_p50 INTEGER NOT NULL,
    latency_us_p99 INTEGER NOT NULL,
    -- JSON, one number for each expert: each live (token, expert) once.
    expert_tokens TEXT NOT NULL,
    PRIMARY KEY (group_name, model, span, end_ms, layer, phase)
) STRICT;

CREATE INDEX windows_by_age ON windows (span, end_ms);

-- The last window of each process that is in a sum: one that comes again is in it already.
CREATE TABLE window_numbers (
    group_name TEXT NOT NULL,
    rank INTEGER NOT NULL,
    -- The process: protocol::session::Register::incarnation.
    incarnation INTEGER NOT NULL,
    number INTEGER NOT NULL,
    kept_ms INTEGER NOT NULL,
    PRIMARY KEY (group_name, rank, incarnation)
) STRICT;
