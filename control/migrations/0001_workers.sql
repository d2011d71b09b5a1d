-- Who has registered: what a worker said of itself, newest process of each rank.
CREATE TABLE workers (
    group_name TEXT NOT NULL,
    rank INTEGER NOT NULL,
    -- JSON, protocol::session::Register.
    register TEXT NOT NULL,
    -- Milliseconds since 1970.
    first_seen_ms INTEGER NOT NULL,
    last_seen_ms INTEGER NOT NULL,
    PRIMARY KEY (group_name, rank)
) STRICT;
