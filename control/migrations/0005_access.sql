-- Who may do what. Secrets are not here: only what they hash to.
CREATE TABLE tokens (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    -- Who it is for; the audit log shows this name.
    name TEXT NOT NULL,
    -- 'viewer', 'operator', 'admin', or 'worker' for the sessions of workers.
    role TEXT NOT NULL,
    -- SHA-256 of the secret, in hexadecimal.
    sha256 TEXT NOT NULL UNIQUE,
    -- Milliseconds since 1970.
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER,
    revoked_ms INTEGER
) STRICT;

-- What was changed, by whom and why.
CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms INTEGER NOT NULL,
    -- Name and role of the token.
    actor TEXT NOT NULL,
    role TEXT NOT NULL,
    action TEXT NOT NULL,
    -- What it was done to.
    target TEXT NOT NULL,
    reason TEXT NOT NULL,
    -- JSON, what of the target was before and is after; null where there was nothing.
    before TEXT,
    after TEXT,
    -- x-request-id of the request.
    request_id TEXT NOT NULL
) STRICT;
