-- What happened, for those who watch; the newest only.
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    -- Milliseconds since 1970.
    at_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    -- JSON.
    data TEXT NOT NULL
) STRICT;

-- Answers to requests with an idempotency key, which are repeated instead of done again.
CREATE TABLE answers (
    -- The caller.
    token INTEGER NOT NULL,
    key TEXT NOT NULL,
    -- SHA-256 of method, path and body.
    request TEXT NOT NULL,
    status INTEGER NOT NULL,
    -- Null where the answer had a secret.
    body TEXT,
    at_ms INTEGER NOT NULL,
    PRIMARY KEY (token, key)
) STRICT;

CREATE INDEX answers_by_age ON answers (at_ms);
