-- Versions of policies that somebody has uploaded, by the SHA-256 of the component.
CREATE TABLE policies (
    digest TEXT PRIMARY KEY,
    -- What the component calls itself, dashes as underscores: versions of a policy share it.
    name TEXT NOT NULL,
    -- 'placement', 'routing' or 'tactics'.
    kind TEXT NOT NULL,
    -- The policy's own words: JSON of version, summary and settings schema.
    info TEXT NOT NULL,
    component BLOB NOT NULL,
    uploaded_ms INTEGER NOT NULL,
    actor TEXT NOT NULL
) STRICT;
CREATE INDEX policies_by_name ON policies (name, uploaded_ms);
-- Which version a name stands for: the newest row that was not rolled back. Without any it is the one that comes with moeplane.
CREATE TABLE activations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    -- Null: the one that comes with moeplane.
    digest TEXT REFERENCES policies (digest),
    at_ms INTEGER NOT NULL,
    rolled_back INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX activations_by_name ON activations (name, rolled_back, id);
-- What became of calls of policies that gave no usable answer.
CREATE TABLE verdicts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms INTEGER NOT NULL,
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    group_name TEXT NOT NULL,
    -- JSON, policy-host's Verdict.
    verdict TEXT NOT NULL
) STRICT;
CREATE INDEX verdicts_by_name ON verdicts (name, id);
