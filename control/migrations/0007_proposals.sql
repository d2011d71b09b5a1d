-- What policies proposed. A proposal is named by all that went into it and never changes.
CREATE TABLE proposals (
    id TEXT PRIMARY KEY,
    group_name TEXT NOT NULL,
    -- Milliseconds since 1970.
    made_ms INTEGER NOT NULL,
    -- JSON, control's Proposal.
    proposal TEXT NOT NULL
) STRICT;

CREATE INDEX proposals_by_age ON proposals (group_name, made_ms);
