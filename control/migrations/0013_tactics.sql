-- How long calls took by each tactic, and what they were measured on.
CREATE TABLE measurements (
    -- JSON: device, driver, hash of kernels.
    provenance TEXT NOT NULL,
    -- JSON.
    problem TEXT NOT NULL,
    tactic TEXT NOT NULL,
    tokens INTEGER NOT NULL,
    runs INTEGER NOT NULL,
    median_us REAL NOT NULL,
    p99_us REAL NOT NULL,
    measured_ms INTEGER NOT NULL,
    PRIMARY KEY (provenance, problem, tactic, tokens)
) STRICT;
-- What a tactics policy chose by them for a group.
CREATE TABLE tactic_tables (
    group_name TEXT NOT NULL,
    provenance TEXT NOT NULL,
    problem TEXT NOT NULL,
    -- JSON.
    choices TEXT NOT NULL,
    policy TEXT NOT NULL,
    digest TEXT NOT NULL,
    -- SHA-256 of policy and question: the same is not asked twice.
    input TEXT NOT NULL,
    explanation TEXT NOT NULL,
    made_ms INTEGER NOT NULL,
    PRIMARY KEY (group_name, provenance, problem)
) STRICT;
