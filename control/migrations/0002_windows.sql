-- What ranks' engines asked for, by window, layer and phase: each (token, expert) once, at the rank that
-- it came from.
CREATE TABLE windows (
    group_name TEXT NOT NULL,
    rank INTEGER NOT NULL,
    -- The process: protocol::session::Register::incarnation.
    incarnation INTEGER NOT NULL,
    number INTEGER NOT NULL,
    layer INTEGER NOT NULL,
    phase TEXT NOT NULL,
    -- Milliseconds since 1970.
    start_ms INTEGER NOT NULL,
    end_ms INTEGER NOT NULL,
    calls INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    distinct_experts INTEGER NOT NULL,
    latency_us_p50 INTEGER NOT NULL,
    latency_us_p99 INTEGER NOT NULL,
    -- JSON, one number for each expert.
    expert_tokens TEXT NOT NULL,
    PRIMARY KEY (group_name, rank, incarnation, number, layer, phase)
) STRICT;

CREATE INDEX windows_by_end ON windows (group_name, end_ms);
