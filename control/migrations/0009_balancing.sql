-- How groups are balanced, where somebody has said so.
CREATE TABLE balancing (
    group_name TEXT PRIMARY KEY,
    -- JSON, control's Balancing.
    balancing TEXT NOT NULL
) STRICT;
